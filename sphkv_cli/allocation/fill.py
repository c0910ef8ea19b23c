"""Spend the bytes that the multiplier left over.

After the cut of the hulls less than one hull segment's bytes remain.  Moves of a single item to any
option of more bytes (on its hull or not) that fits are taken in order of gain per byte until none
fits; a move is checked again when its turn comes, since an earlier one may have changed its item or
the bytes left.  Source: the usual greedy completion of the multiple-choice knapsack.
"""

import numpy as np
from numpy.typing import NDArray

_BLOCK_ITEMS = 1 << 14
_MOVES_PER_BLOCK = 64
_MAX_ROUNDS = 64


def fill_remaining(
    costs: NDArray[np.floating],
    option_bytes: NDArray[np.int64],
    option_of_item: NDArray[np.int8],
    budget_bytes: int,
) -> NDArray[np.int8]:
    """A plan that costs no more than the given one and still fits.

    Args:
        costs: (n_items, n_options).
        option_bytes: (n_items or 1, n_options).
        option_of_item: (n_items) a plan within the budget.
        budget_bytes: the budget.
    """
    plan = option_of_item.copy()
    sizes = np.broadcast_to(option_bytes, costs.shape)
    shared = option_bytes.shape[0] == 1
    counts = np.bincount(plan, minlength=costs.shape[1]) if shared else None
    if counts is not None:
        used = int(counts @ option_bytes[0])
    else:
        used = int(np.take_along_axis(option_bytes, plan[:, None].astype(np.intp), axis=1).sum())
    left = budget_bytes - used
    for _ in range(_MAX_ROUNDS):
        moves = _best_moves(costs, option_bytes, plan, left)
        before = left
        for item, option in moves:
            more = int(sizes[item, option]) - int(sizes[item, plan[item]])
            if 0 <= more <= left and costs[item, option] < costs[item, plan[item]]:
                plan[item] = option
                left -= more
        if left == before:
            return plan
    return plan


def _best_moves(
    costs: NDArray[np.floating],
    option_bytes: NDArray[np.int64],
    plan: NDArray[np.int8],
    left_bytes: int,
) -> list[tuple[int, int]]:
    """(item, option) of the moves that fit, most gain per byte first; the best of every block."""
    n_items, n_options = costs.shape
    found: list[tuple[float, int, int]] = []
    for start in range(0, n_items, _BLOCK_ITEMS):
        rows = slice(start, start + _BLOCK_ITEMS)
        block = costs[rows]
        picked = plan[rows].astype(np.intp)
        each = np.arange(picked.size)
        own_cost = block[each, picked]
        if option_bytes.shape[0] == 1:
            block_bytes = option_bytes
            own_bytes = option_bytes[0, picked]
        else:
            block_bytes = option_bytes[rows]
            own_bytes = block_bytes[each, picked]
        for option in range(1, n_options):
            more = block_bytes[:, option] - own_bytes
            gain = own_cost - block[:, option]
            hit = np.flatnonzero((more >= 0) & (more <= left_bytes) & (gain > 0))
            if not hit.size:
                continue
            rate = gain[hit] / np.maximum(more[hit], 1)
            if hit.size > _MOVES_PER_BLOCK:
                top = np.argpartition(-rate, _MOVES_PER_BLOCK)[:_MOVES_PER_BLOCK]
                hit, rate = hit[top], rate[top]
            found += [(-float(r), int(i) + start, option) for r, i in zip(rate, hit, strict=True)]
    return [(item, option) for _, item, option in sorted(found)]
