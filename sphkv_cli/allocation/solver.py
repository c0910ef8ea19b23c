"""Choose one option per item so that the summed cost is least within a byte budget.

    minimise sum_i c_{i,j(i)}   subject to   sum_i b_{i,j(i)} <= B        (multiple-choice knapsack)

The Lagrangian dual D(lambda) = sum_i min_j (c_ij + lambda b_ij) - lambda B bounds the optimum from
below for every lambda >= 0; its maximum lies at a rate of the items' convex hulls (hull.py,
multiplier.py) and is the value of the linear relaxation.  The plan takes every hull segment above
that rate and the ties that fit, then fills the remaining bytes greedily; the best uniform plan (one
option for all) is computed beside it and the better of the two is returned.

Cost: a handful of passes over the table in blocks; memory beyond the table is one byte per item and
a block.  Source: Everett 1963 for the multipliers; ours as a whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sphkv_cli.allocation.fill import fill_remaining
from sphkv_cli.allocation.hull import Float, hull_rates, running_minimum
from sphkv_cli.allocation.multiplier import NO_GAIN, Cut, RateHistogram, cut_in_bin

Int = NDArray[np.int64]

_BLOCK_ITEMS = 1 << 14


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


def solve(costs: NDArray[np.floating], option_bytes: Int, budget_bytes: int) -> Solution:
    """Solve one allocation.

    Args:
        costs: (n_items, n_options) finite, >= 0; float64 or float32.
        option_bytes: (n_options) or (n_items, n_options) integers >= 0, non-decreasing over the
            options of every item.
        budget_bytes: B.

    Raises:
        InfeasibleBudgetError: not even the first options fit.
        ValueError: shapes or values as above do not hold.
    """
    table = CostTable(costs, option_bytes)
    budget = int(budget_bytes)
    minimum = table.minimum_bytes()
    if budget < minimum:
        raise InfeasibleBudgetError(budget, minimum)
    histogram = RateHistogram()
    for _, rates, sizes in table.segments():
        histogram.add(rates, sizes)
    left = float(budget - minimum)
    critical, above = histogram.critical_bin(left)
    cut = Cut(NO_GAIN, np.empty(0, dtype=np.int64))
    if critical:
        cut = cut_in_bin(table.segments(), critical, left - above)
    options = table.options_above(cut)
    option_of_item = fill_remaining(table.costs, table.option_bytes, options, budget)
    greedy = table.plan(option_of_item)
    multiplier = 0.0 if cut.rate == NO_GAIN else cut.rate
    uniform_costs, uniform_bytes = table.uniform_plans()
    fitting = np.flatnonzero(uniform_bytes <= budget)
    best = int(fitting[np.argmin(uniform_costs[fitting])]) if fitting.size else None
    plan = greedy
    if best is not None and uniform_costs[best] < greedy.cost:
        same = np.full(table.n_items, best, dtype=np.int8)
        plan = Plan(same, float(uniform_costs[best]), int(uniform_bytes[best]))
    return Solution(
        plan=plan,
        budget_bytes=budget,
        greedy_cost=greedy.cost,
        dual_bound=table.dual_value(multiplier, budget),
        multiplier=multiplier,
        uniform_option=best,
        uniform_cost=np.inf if best is None else float(uniform_costs[best]),
        uniform_bytes=0 if best is None else int(uniform_bytes[best]),
    )


class CostTable:
    """Costs and bytes of all items, read in blocks of items with options along the first axis."""

    def __init__(self, costs: NDArray[np.floating], option_bytes: Int) -> None:
        if costs.ndim != 2 or costs.shape[1] < 1 or costs.shape[1] > 127:
            raise ValueError(
                f"costs: shape {costs.shape}, must be (n_items, n_options) with 1 to 127 options"
            )
        self.n_items, self.n_options = costs.shape
        if option_bytes.shape not in ((self.n_options,), costs.shape):
            raise ValueError(
                f"option_bytes: shape {option_bytes.shape}, must be ({self.n_options},) or "
                f"{costs.shape}"
            )
        if not np.issubdtype(option_bytes.dtype, np.integer):
            raise ValueError(f"option_bytes: {option_bytes.dtype}, must be integers")
        self.costs = costs
        self.option_bytes = option_bytes.reshape(-1, self.n_options)
        for start in self._starts():
            block = costs[start : start + _BLOCK_ITEMS]
            # A NaN fails both comparisons.
            if not (block.min(initial=0.0) >= 0 and block.max(initial=0.0) < np.inf):
                raise ValueError("costs must be finite and not negative")
        if self.n_options > 1 and np.diff(self.option_bytes, axis=1).min(initial=0) < 0:
            raise ValueError("options must come in order of non-decreasing bytes")
        if self.option_bytes.min(initial=0) < 0:
            raise ValueError("option_bytes must not be negative")

    def minimum_bytes(self) -> int:
        """Bytes of every item's first option."""
        return self._total(self.option_bytes[:, 0])

    def blocks(self) -> Iterator[tuple[int, Float, Float]]:
        """(first item, costs (n_options, n), bytes (n_options, n or 1)), both float64."""
        for start in self._starts():
            rows = slice(start, start + _BLOCK_ITEMS)
            costs = np.ascontiguousarray(self.costs[rows].T, dtype=np.float64)
            sizes = (
                self.option_bytes if self.option_bytes.shape[0] == 1 else self.option_bytes[rows]
            )
            yield start, costs, np.ascontiguousarray(sizes.T, dtype=np.float64)

    def segments(self) -> Iterator[tuple[int, Float, Float]]:
        """(first item, hull rates, segment bytes) of every block."""
        for start, costs, sizes in self.blocks():
            yield start, hull_rates(running_minimum(costs), sizes), np.diff(sizes, axis=0)

    def options_above(self, cut: Cut) -> NDArray[np.int8]:
        """(n_items) the hull option of every item at the cut, ties included."""
        levels = np.empty(self.n_items, dtype=np.int8)
        for start, rates, _ in self.segments():
            levels[start : start + rates.shape[1]] = np.sum(rates > cut.rate, axis=0, dtype=np.int8)
        before = levels[cut.tied_items[-1:]].copy()
        np.add.at(levels, cut.tied_items, np.int8(1))
        # Only the last tied item can have been cut inside one straight piece of its hull, where
        # no option lies on the hull: back to its corner unless the piece is complete.
        last = cut.tied_items[-1:]
        if last.size and not self._is_corner(int(last[0]), int(levels[last[0]])):
            levels[last] = before
        for start, costs, _ in self.blocks():
            rows = slice(start, start + costs.shape[1])
            reached = running_minimum(costs.copy())[levels[rows], np.arange(costs.shape[1])]
            levels[rows] = np.argmax(costs <= reached, axis=0)
        return levels

    def dual_value(self, multiplier: float, budget_bytes: int) -> float:
        """D(multiplier) from all options, whatever the hulls say: valid for any multiplier."""
        total = 0.0
        for _, costs, sizes in self.blocks():
            total += float((costs + multiplier * sizes).min(axis=0).sum())
        return total - multiplier * budget_bytes

    def uniform_plans(self) -> tuple[Float, Int]:
        """Summed cost and bytes of giving every item the same option: (n_options) each."""
        costs = np.zeros(self.n_options)
        for _, block, _ in self.blocks():
            costs += block.sum(axis=1)
        sizes = [self._total(self.option_bytes[:, j]) for j in range(self.n_options)]
        return costs, np.array(sizes, dtype=np.int64)

    def plan(self, option_of_item: NDArray[np.int8]) -> Plan:
        """The plan of one option per item, with its sums."""
        cost, used = 0.0, 0
        for start in self._starts():
            rows = slice(start, start + _BLOCK_ITEMS)
            picked = option_of_item[rows].astype(np.intp)
            each = np.arange(picked.size)
            cost += float(self.costs[rows][each, picked].sum(dtype=np.float64))
            if self.option_bytes.shape[0] == 1:
                used += int(self.option_bytes[0, picked].sum())
            else:
                used += int(self.option_bytes[rows][each, picked].sum())
        return Plan(option_of_item, cost, used)

    def _is_corner(self, item: int, level: int) -> bool:
        row = slice(item, item + 1)
        sizes = self._bytes_of(row)
        costs = running_minimum(self.costs[row].T.astype(np.float64))
        rates = hull_rates(costs, sizes.T.astype(np.float64))[:, 0]
        return level in (0, self.n_options - 1) or bool(rates[level] < rates[level - 1])

    def _bytes_of(self, rows: slice) -> Int:
        """(n or 1, n_options)"""
        return self.option_bytes if self.option_bytes.shape[0] == 1 else self.option_bytes[rows]

    def _total(self, sizes: Int) -> int:
        repeats = self.n_items if self.option_bytes.shape[0] == 1 else 1
        return int(sizes.sum()) * repeats

    def _starts(self) -> range:
        return range(0, self.n_items, _BLOCK_ITEMS)
