"""The cheapest demotions of a few pages that free enough bytes, exactly.

    minimise sum_i lost_i,j(i)   subject to   sum_i freed_i,j(i) >= D

States (bytes freed, cost lost) are built page by page.  One is dropped where another frees no less
and loses no more, and where even the linear relaxation of what is left to decide,

    lost + rate (D - freed) + sum_{later i} min_j (lost_ij - rate freed_ij)     for any rate >= 0,

ends above the greedy solution.  With the greedy's own rate few states live.
Source: Pisinger, A minimal algorithm for the multiple-choice knapsack problem, EJOR 1995.
"""

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Int = NDArray[np.int64]

_MOST_STATES = 4096


@dataclass(frozen=True)
class _States:
    """After some pages: bytes freed (up to D), cost lost; option and former state of each."""

    freed: Int
    lost: Float
    option: Int
    parent: Int


def cheapest_cover(freed: Int, lost: Float, wanted: int) -> Int:
    """(n_pages) option of each page.

    Args:
        freed: (n_pages, n_options) bytes >= 0, negative where an option is not allowed; one option
            of every page frees 0 at no loss, and all pages together can free `wanted`.
        lost: (n_pages, n_options) cost >= 0.
        wanted: D.
    """
    allowed = freed >= 0
    lost = np.where(allowed, lost, np.inf)
    rate, incumbent = _greedy(freed, lost, wanted)
    relaxed = np.where(allowed, lost - rate * freed, np.inf).min(axis=1)
    later = np.append(relaxed[::-1].cumsum()[::-1][1:], 0.0)
    # What the last pages can free at most: a state that cannot reach D is dead.
    most = np.append(freed.max(axis=1)[::-1].cumsum()[::-1][1:], 0)
    # Rounding must not drop the greedy solution itself.
    limit = incumbent * (1 + 1e-12) + 1e-300
    states = [_States(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64), np.zeros(1, int))]
    for page in range(freed.shape[0]):
        states.append(
            _extended(
                states[-1], freed[page], lost[page], wanted, rate, later[page], most[page], limit
            )
        )
    place = int(np.flatnonzero(states[-1].freed >= wanted)[0])
    options = np.empty(freed.shape[0], dtype=np.int64)
    for page in range(freed.shape[0] - 1, -1, -1):
        options[page] = states[page + 1].option[place]
        place = int(states[page + 1].parent[place])
    return options


def _extended(
    states: _States,
    freed: Int,
    lost: Float,
    wanted: int,
    rate: float,
    later: float,
    most: int,
    limit: float,
) -> _States:
    options = np.flatnonzero(freed >= 0)
    all_freed = np.minimum(states.freed[None] + freed[options, None], wanted).ravel()
    all_lost = (states.lost[None] + lost[options, None]).ravel()
    bound = all_lost + rate * (wanted - all_freed) + later
    # The relaxation sums what cancels; its rounding is that of its largest term.
    slack = 1e-12 * (np.abs(later) + rate * wanted)
    alive = np.flatnonzero((bound <= limit + slack) & (all_freed + most >= wanted))
    # Most freed first; of those that follow only the cheaper ones.
    order = alive[np.lexsort((all_lost[alive], -all_freed[alive]))]
    cheapest = np.minimum.accumulate(np.append(np.inf, all_lost[order]))[:-1]
    order = order[all_lost[order] < cheapest]
    if order.size > _MOST_STATES:
        best = np.argpartition(bound[order], _MOST_STATES)[:_MOST_STATES]
        # The first frees most: whatever else is dropped, D stays in reach.
        order = order[np.union1d(best, 0)]
    option, parent = np.divmod(order, states.freed.size)
    return _States(all_freed[order], all_lost[order], options[option], parent)


def _greedy(freed: Int, lost: Float, wanted: int) -> tuple[float, float]:
    """Rate of the last of the cheapest hull demotions that free enough, and what they lose."""
    current = np.where(freed == 0, lost, np.inf).argmin(axis=1)
    heap: list[tuple[float, int, int]] = []

    def push(page: int) -> None:
        more = freed[page] - freed[page, current[page]]
        usable = np.flatnonzero(more > 0)
        if usable.size:
            rates = (lost[page, usable] - lost[page, current[page]]) / more[usable]
            least = int(rates.argmin())
            heapq.heappush(heap, (float(rates[least]), page, int(usable[least])))

    for page in range(freed.shape[0]):
        push(page)
    total, cost, rate = 0, 0.0, 0.0
    while total < wanted:
        rate, page, option = heapq.heappop(heap)
        total += int(freed[page, option] - freed[page, current[page]])
        cost += float(lost[page, option] - lost[page, current[page]])
        current[page] = option
        push(page)
    return rate, cost
