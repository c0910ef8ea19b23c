"""A budget that holds while pages arrive: sealed pages only ever lose precision.

Page i has options of rising bytes b_ij and its cost c_ij in each; it is in option o_i, and may move
to options below it alone.  After every step, pages having arrived or the budget having shrunk,

    minimise sum_i c_{i,j(i)}   subject to   sum_i b_{i,j(i)} <= B_t,   j(i) <= o_i

1. demotions along the lower hulls below o_i are taken in order of cost per byte freed, from a heap,
   until what is still to be freed is about a page;
2. the last of them and the next pages of the heap (the core) are decided exactly (cover.py): least
   cost that frees at least so much.

A step costs O(new + demoted pages) log(all pages) and one small cover, whatever the cache holds.
What an earlier step decided is never taken back, so a run may end above what one solution of all
pages would cost; `bound.py` says by how much, and how near a step is to the best that its past
allowed.  Source: ours, with Pisinger's core.
"""

import heapq
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sphkv_cli.allocation.solver import InfeasibleBudgetError
from sphkv_cli.growing.cover import cheapest_cover

Float = NDArray[np.float64]
Int = NDArray[np.int64]

Kind = TypeVar("Kind", bound=np.generic)

_CORE_PAGES = 32
_CORE_MOVED = 16


@dataclass(frozen=True)
class Demotion:
    """A page that was in option `before` is now in the smaller `after`; 0 of a layout drops it.

    page: its number, in order of arrival from 0.
    """

    page: int
    before: int
    after: int


@dataclass(frozen=True)
class GrowthStep:
    """What one step did.

    first_page, n_arrived: the new pages; options: (n_arrived) int8, theirs after the step.
    demotions: of older pages, in order of their numbers.
    """

    first_page: int
    n_arrived: int
    options: NDArray[np.int8]
    demotions: tuple[Demotion, ...]
    used_bytes: int
    cost: float


class GrowingAllocation:
    """Pages of one cache under one budget, step by step.

    Args:
        n_options: of every page, in order of bytes.

    Use: `append(costs, option_bytes, budget_bytes)` whenever pages are sealed, `shrink(budget)`
    when only the budget changes; apply the demotions that come back.  A step that raises changes
    nothing.
    """

    def __init__(self, n_options: int) -> None:
        if not 1 <= n_options <= 127:
            raise ValueError(f"{n_options} options, must be 1 to 127")
        self.n_options = n_options
        self._costs = np.empty((0, n_options))
        self._bytes = np.empty((0, n_options), dtype=np.int64)
        self._options = np.empty(0, dtype=np.int8)
        self._n_pages = 0
        self._minimum = 0
        self._used = 0
        self._heap: list[tuple[float, int, int, int]] = []

    @property
    def n_pages(self) -> int:
        """Pages that arrived so far, dropped ones too."""
        return self._n_pages

    @property
    def options(self) -> NDArray[np.int8]:
        """(n_pages) option of every page now, a copy."""
        return self._options[: self._n_pages].copy()

    @property
    def costs(self) -> Float:
        """(n_pages, n_options), as they were appended; a view."""
        return self._costs[: self._n_pages]

    @property
    def option_bytes(self) -> Int:
        """(n_pages, n_options), as they were appended; a view."""
        return self._bytes[: self._n_pages]

    @property
    def used_bytes(self) -> int:
        """Bytes of all pages now."""
        return self._used

    @property
    def cost(self) -> float:
        """Summed cost of all pages now."""
        each = np.arange(self._n_pages)
        return float(self.costs[each, self._options[: self._n_pages]].sum())

    def append(
        self,
        costs: NDArray[np.floating],
        option_bytes: NDArray[np.integer],
        budget_bytes: int,
        *,
        at_most: NDArray[np.integer] | None = None,
    ) -> GrowthStep:
        """Seal pages and bring all pages within the budget.

        Args:
            costs: (n_new, n_options) finite, >= 0.
            option_bytes: (n_options) or (n_new, n_options) integers >= 0 that do not fall along
                the options.
            budget_bytes: for all pages together.
            at_most: (n_new) largest option of each new page (pages that are coded already); all
                options without it.

        Raises:
            InfeasibleBudgetError: not even the smallest options fit.
            ValueError: shapes or values as above do not hold.
        """
        new_costs, new_bytes, ceiling = self._checked(costs, option_bytes, at_most)
        minimum = self._minimum + int(new_bytes[:, 0].sum())
        if budget_bytes < minimum:
            raise InfeasibleBudgetError(int(budget_bytes), minimum)
        first, before = self._n_pages, self._options[: self._n_pages].copy()
        self._grow(new_costs, new_bytes, ceiling)
        self._minimum = minimum
        moved = self._free(self._used - int(budget_bytes))
        demotions = tuple(
            Demotion(page, int(before[page]), int(self._options[page]))
            for page in sorted(moved)
            if page < first
        )
        arrived = self._options[first : self._n_pages].copy()
        return GrowthStep(first, arrived.size, arrived, demotions, self._used, self.cost)

    def shrink(self, budget_bytes: int) -> GrowthStep:
        """Bring the pages that are there within another budget; a larger one changes nothing."""
        none = np.empty((0, self.n_options))
        return self.append(none, none.astype(np.int64), budget_bytes)

    def _checked(
        self,
        costs: NDArray[np.floating],
        option_bytes: NDArray[np.integer],
        at_most: NDArray[np.integer] | None,
    ) -> tuple[Float, Int, Int]:
        if costs.ndim != 2 or costs.shape[1] != self.n_options:
            raise ValueError(f"costs: shape {costs.shape}, must be (n_new, {self.n_options})")
        if option_bytes.shape not in ((self.n_options,), costs.shape):
            raise ValueError(
                f"option_bytes: shape {option_bytes.shape}, must be ({self.n_options},) or "
                f"{costs.shape}"
            )
        if not np.issubdtype(option_bytes.dtype, np.integer):
            raise ValueError(f"option_bytes: {option_bytes.dtype}, must be integers")
        if not (np.isfinite(costs).all() and (costs >= 0).all()):
            raise ValueError("costs must be finite and not negative")
        sizes = np.broadcast_to(option_bytes, costs.shape).astype(np.int64)
        if (sizes < 0).any() or (np.diff(sizes, axis=1) < 0).any():
            raise ValueError("option_bytes must not be negative, nor fall along the options")
        ceiling = np.full(costs.shape[0], self.n_options - 1)
        if at_most is not None:
            ceiling = np.asarray(at_most, dtype=np.int64)
            if ceiling.shape != costs.shape[:1]:
                raise ValueError(f"at_most: shape {ceiling.shape}, must be ({costs.shape[0]},)")
            if ceiling.size and not 0 <= ceiling.min() <= ceiling.max() < self.n_options:
                raise ValueError(f"at_most names options outside 0..{self.n_options - 1}")
        return costs.astype(np.float64), sizes, ceiling

    def _grow(self, costs: Float, sizes: Int, ceiling: Int) -> None:
        """Add pages in their cheapest allowed option (the smallest of equals)."""
        first, last = self._n_pages, self._n_pages + costs.shape[0]
        if last > self._options.size:
            room = max(2 * self._options.size, last, 64)
            self._costs = _resized(self._costs, room)
            self._bytes = _resized(self._bytes, room)
            self._options = _resized(self._options, room)
        self._costs[first:last] = costs
        self._bytes[first:last] = sizes
        allowed = np.arange(self.n_options) <= ceiling[:, None]
        self._options[first:last] = np.where(allowed, costs, np.inf).argmin(axis=1)
        self._n_pages = last
        each = np.arange(costs.shape[0])
        self._used += int(sizes[each, self._options[first:last]].sum())
        self._push(np.arange(first, last))

    def _push(self, pages: Int) -> None:
        """Put the next hull segment below each page's option on the heap."""
        if not pages.size:
            return
        costs, sizes = self._costs[pages], self._bytes[pages]
        options = self._options[pages].astype(np.int64)
        each = np.arange(pages.size)
        freed = sizes[each, options][:, None] - sizes
        more = costs - costs[each, options][:, None]
        usable = (np.arange(self.n_options) < options[:, None]) & (freed > 0)
        rates = np.where(usable, more / np.maximum(freed, 1), np.inf)
        # Of equal rates the farthest: one straight piece of the hull is one demotion.
        lower = rates.argmin(axis=1)
        for place in np.flatnonzero(usable.any(axis=1)).tolist():
            entry = (
                float(rates[place, lower[place]]),
                int(pages[place]),
                int(options[place]),
                int(lower[place]),
            )
            heapq.heappush(self._heap, entry)

    def _free(self, n_bytes: int) -> set[int]:
        """Free at least n_bytes by demotions; the pages that moved."""
        before: dict[int, int] = {}
        while n_bytes > 0:
            _, page, option, after = heapq.heappop(self._heap)
            if option != self._options[page]:
                continue  # An entry from before the page moved.
            freed = int(self._bytes[page, option] - self._bytes[page, after])
            if n_bytes <= max(2 * freed, int(self._bytes[page, -1])):
                # Near enough for an exact choice; this page belongs to it.
                self._push(np.array([page]))
                self._free_exactly(n_bytes, before)
                break
            # The latest move of a page comes last.
            before[page] = before.pop(page, option)
            self._set(page, after)
            self._push(np.array([page]))
            n_bytes -= freed
        return {page for page, option in before.items() if option != self._options[page]}

    def _free_exactly(self, n_bytes: int, before: dict[int, int]) -> None:
        """Free at least n_bytes, deciding anew about the last moves and the next pages.

        before: option of the moved pages when the step began, in order of their latest moves; is
            extended.
        """
        # Where each page of the core may go down from: its option when the step began, or, for a
        # page that moved earlier in the step, the one it has now.
        ceilings = {page: before[page] for page in list(before)[-_CORE_MOVED:]}
        wanted, most = n_bytes, 0
        for page, ceiling in ceilings.items():
            wanted += int(self._bytes[page, ceiling] - self._bytes[page, self._options[page]])
            most += int(self._bytes[page, ceiling] - self._bytes[page, 0])
        n_moved = len(ceilings)
        while self._heap and (len(ceilings) - n_moved < _CORE_PAGES or most < wanted):
            _, page, option, _ = heapq.heappop(self._heap)
            if option != self._options[page] or page in ceilings:
                continue
            ceilings[page] = option
            before.setdefault(page, option)
            most += int(self._bytes[page, option] - self._bytes[page, 0])
        core = list(ceilings)
        pages, start = np.array(core), np.array(list(ceilings.values()))
        freed = self._bytes[pages, start][:, None] - self._bytes[pages]
        lost = self._costs[pages] - self._costs[pages, start][:, None]
        freed[np.arange(self.n_options) > start[:, None]] = -1
        chosen = cheapest_cover(freed, lost, wanted)
        for page, option in zip(core, chosen.tolist(), strict=True):
            self._set(page, option)
        self._push(np.array(core))

    def _set(self, page: int, option: int) -> None:
        self._used += int(self._bytes[page, option] - self._bytes[page, self._options[page]])
        self._options[page] = option


def _resized(values: NDArray[Kind], n_rows: int) -> NDArray[Kind]:
    larger = np.empty((n_rows, *values.shape[1:]), dtype=values.dtype)
    larger[: values.shape[0]] = values
    return larger
