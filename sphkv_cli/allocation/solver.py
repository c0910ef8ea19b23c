"""Choose one option per item so that the summed cost is least within a byte budget.

    minimise sum_i c_{i,j(i)}   subject to   sum_i b_{i,j(i)} <= B        (multiple-choice knapsack)

The Lagrangian dual D(lambda) = sum_i min_j (c_ij + lambda b_ij) - lambda B bounds the optimum from
below for every lambda >= 0; its maximum lies at a rate of the items' convex hulls (hull.py,
multiplier.py) and is the value of the linear relaxation.  The plan takes every hull segment above
that rate and the ties that fit, then fills the remaining bytes greedily; the best uniform plan (one
option for all) is computed beside it and the better of the two is returned.

Cost: one pass over the table for the hulls, one for the cut and one or two for the fill and the
certificate, in blocks on all threads; memory beyond the table is one byte per item and two per
option, the segments of one bin of rates, and a block per thread.  Source: Everett 1963 for the
multipliers; ours as a whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sphkv_cli.allocation.cost_table import Block, Costs, CostTable, Float
from sphkv_cli.allocation.fill import fill_remaining
from sphkv_cli.allocation.hull import hull_rates, running_minimum
from sphkv_cli.allocation.multiplier import Cut, RateHistogram, Segments, cut_segments


class InfeasibleBudgetError(ValueError):
    """The budget is below the bytes of the smallest option of every item."""

    def __init__(self, budget_bytes: int, minimum_bytes: int) -> None:
        super().__init__(
            f"a budget of {budget_bytes} bytes is below the {minimum_bytes} bytes that the "
            "smallest options take"
        )
        self.budget_bytes = budget_bytes
        self.minimum_bytes = minimum_bytes


@dataclass(frozen=True)
class Plan:
    """One option per item.

    option_of_item: (n_items) int8; cost: summed; used_bytes: summed, never above the budget.
    """

    option_of_item: NDArray[np.int8]
    cost: float
    used_bytes: int


@dataclass(frozen=True)
class Solution:
    """The returned plan, its certificate, and what it was compared with.

    plan: the better of `greedy` and the uniform plan.
    greedy_cost: cost of the Lagrangian plan after the greedy fill.
    dual_bound: no plan within the budget costs less (to rounding).
    multiplier: cost per byte at the budget; 0 when every gain fits.
    uniform_option, uniform_cost, uniform_bytes: the best single option for all items that fits.
    """

    plan: Plan
    budget_bytes: int
    greedy_cost: float
    dual_bound: float
    multiplier: float
    uniform_option: int | None
    uniform_cost: float
    uniform_bytes: int

    @property
    def gap(self) -> float:
        """(cost - dual bound) / cost: the plan is within this fraction of the best possible."""
        if self.plan.cost <= 0:
            return 0.0
        return max(0.0, (self.plan.cost - self.dual_bound) / self.plan.cost)

    @property
    def is_uniform(self) -> bool:
        """Whether the uniform plan was the better one."""
        return self.uniform_cost < self.greedy_cost


def solve(
    costs: Costs,
    option_bytes: NDArray[np.integer],
    budget_bytes: int,
    *,
    n_threads: int | None = None,
) -> Solution:
    """Solve one allocation.

    Args:
        costs: (n_items, n_options) finite, >= 0; float64 or float32.
        option_bytes: (n_options) or (n_items, n_options) integers >= 0, non-decreasing over the
            options of every item.
        budget_bytes: B.
        n_threads: None for one per core that this process may use; the result is the same.

    Raises:
        InfeasibleBudgetError: not even the first options fit.
        ValueError: shapes or values as above do not hold.
    """
    return solve_parts([(costs, option_bytes)], budget_bytes, n_threads=n_threads)


def solve_parts(
    parts: Sequence[tuple[Costs, NDArray[np.integer]]],
    budget_bytes: int,
    *,
    n_threads: int | None = None,
) -> Solution:
    """The same over several tables (layers) under one budget, each read in blocks as it is needed.

    Args:
        parts: (costs, option_bytes) as for `solve`; costs may be anything that slices into an
            array (numpy.memmap, an HDF5 dataset).  Items are counted through the parts.
    """
    table = CostTable(parts, n_threads)
    budget = int(budget_bytes)
    sizes = table.bytes_of_option()
    minimum = int(sizes[0])
    if budget < minimum:
        raise InfeasibleBudgetError(budget, minimum)
    # Two bytes a segment: the second pass computes the hulls of the critical bin alone.
    bins = np.empty((table.n_options - 1, table.n_items), dtype=np.uint16)
    surveys = table.over_blocks(lambda blocks: _survey(blocks, bins))
    uniform_costs = (
        np.sum([costs for costs, _ in surveys], axis=0) if surveys else np.zeros(table.n_options)
    )
    histogram = RateHistogram.merged(histogram for _, histogram in surveys)
    left = float(budget - minimum)
    critical, above = histogram.critical_bin(left)
    levels = np.empty(table.n_items, dtype=np.int8)
    found = table.over_blocks(lambda blocks: _take_above(blocks, critical, bins, levels))
    multiplier = 0.0
    if critical:
        cut = cut_segments(Segments.joined(found), left - above)
        multiplier = cut.rate
        table.over_blocks(lambda blocks: _take_cut(blocks, cut, levels))
    del found
    used = fill_remaining(table, levels, budget)
    sums = table.over_blocks(lambda blocks: _certificate(blocks, multiplier, levels))
    least, greedy_cost = (float(np.sum(column)) for column in zip(*sums, strict=True))
    plan = Plan(levels, greedy_cost, used)
    fitting = np.flatnonzero(sizes <= budget)
    best = int(fitting[np.argmin(uniform_costs[fitting])]) if fitting.size else None
    if best is not None and uniform_costs[best] < greedy_cost:
        same = np.full(table.n_items, best, dtype=np.int8)
        plan = Plan(same, float(uniform_costs[best]), int(sizes[best]))
    return Solution(
        plan=plan,
        budget_bytes=budget,
        greedy_cost=greedy_cost,
        dual_bound=least - multiplier * budget,
        multiplier=multiplier,
        uniform_option=best,
        uniform_cost=np.inf if best is None else float(uniform_costs[best]),
        uniform_bytes=0 if best is None else int(sizes[best]),
    )


def _survey(blocks: Iterator[Block], bins: NDArray[np.uint16]) -> tuple[Float, RateHistogram]:
    """Check the costs, set the bins of the hulls' rates; (summed cost of every option, bytes by
    bin)."""
    totals: Float | float = 0.0
    histogram = RateHistogram()
    for block in blocks:
        costs, sizes = block.columns()
        # A NaN fails both comparisons.
        if not (costs.min(initial=0.0) >= 0 and costs.max(initial=0.0) < np.inf):
            raise ValueError("costs must be finite and not negative")
        totals = totals + costs.sum(axis=1)
        rates = hull_rates(running_minimum(costs), sizes)
        bins[:, block.rows] = histogram.add(rates, np.diff(sizes, axis=0))
    return np.asarray(totals), histogram


def _take_above(
    blocks: Iterator[Block], critical: int, bins: NDArray[np.uint16], levels: NDArray[np.int8]
) -> Segments:
    """Set the options that every hull reaches above the critical bin; the bin's own segments."""
    found = []
    for block in blocks:
        costs, _ = block.columns()
        of_block = bins[:, block.rows]
        n_above: NDArray[np.int8] = (of_block > critical).sum(axis=0, dtype=np.int8)
        levels[block.rows] = _first_reaching(running_minimum(costs), n_above)
        if not critical:
            continue
        in_bin = np.flatnonzero((of_block == critical).any(axis=0))
        some, sizes = block.of(in_bin).columns()
        rates = hull_rates(running_minimum(some), sizes)
        sizes = np.diff(sizes, axis=0)
        found.append(Segments.of_bin(in_bin + block.start, rates, sizes, critical))
    return Segments.joined(found)


def _first_reaching(costs: Float, levels: NDArray[np.int8]) -> NDArray[np.int8]:
    """First option that costs no more than the one at `levels`; costs: running minima."""
    n_items = levels.size
    reached = costs.ravel().take(levels.astype(np.intp) * n_items + np.arange(n_items))
    option = np.zeros(n_items, dtype=np.int8)
    for column in costs[:-1]:
        option += column > reached
    return option


def _take_cut(blocks: Iterator[Block], cut: Cut, levels: NDArray[np.int8]) -> None:
    """Move the items of the critical bin along their hulls, as far as the cut says, in place."""
    for block in blocks:
        rows = block.rows
        first, last = np.searchsorted(cut.items, [rows.start, rows.stop])
        items = cut.items[first:last]
        if not items.size:
            continue
        some = block.of(items - rows.start)
        costs, sizes = some.columns()
        running_minimum(costs)
        reached = cut.levels[first:last].copy()
        # Only the item whose segment was taken last can have been cut inside one straight piece of
        # its hull, where no option lies on the hull: back to its corner unless it is complete.
        for place in np.flatnonzero(items == cut.last_item):
            one = sizes if sizes.shape[1] == 1 else sizes[:, place : place + 1]
            reached[place] = _corner(
                hull_rates(costs[:, place : place + 1], one)[:, 0], int(reached[place])
            )
        levels[items] = _first_reaching(costs, reached)


def _corner(rates: Float, level: int) -> int:
    """`level` where it is a corner of the hull, otherwise the corner below it."""
    if level in (0, rates.size) or rates[level] < rates[level - 1]:
        return level
    return int(np.sum(rates > rates[level - 1]))


def _certificate(
    blocks: Iterator[Block], multiplier: float, plan: NDArray[np.int8]
) -> tuple[float, float]:
    """(sum of min_j (c_j + multiplier b_j), cost of the plan), from all options."""
    least, cost = 0.0, 0.0
    for block in blocks:
        costs, sizes = block.columns()
        cost += float(block.chosen(plan[block.rows])[0].sum())
        costs += multiplier * sizes
        least += float(running_minimum(costs)[-1].sum())
    return least, cost
