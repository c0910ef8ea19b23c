"""Spend the bytes that the multiplier left over.

After the cut of the hulls less than one hull segment's bytes remain.  Moves of a single item to any
option of more bytes (on its hull or not) that fits are taken in order of gain per byte until none
fits; a move is checked again when its turn comes, since an earlier one may have changed its item or
the bytes left.  Source: the usual greedy completion of the multiple-choice knapsack.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sphkv_cli.allocation.cost_table import Block, CostTable, Float, Int

_MOVES = 1 << 15
_MAX_ROUNDS = 64


@dataclass(frozen=True)
class _Moves:
    """item, option, more bytes, gain of each: (n)."""

    items: Int
    options: Int
    more: Int
    gains: Float

    @staticmethod
    def joined(parts: list["_Moves"]) -> "_Moves":
        columns = ("items", "options", "more", "gains")
        return _Moves(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in columns)
        )


def fill_remaining(table: CostTable, plan: NDArray[np.int8], budget_bytes: int) -> int:
    """Improve a plan within the budget in place; returns its bytes."""
    used = sum(table.over_blocks(lambda blocks: _used_bytes(blocks, plan)))
    per_block = max(_MOVES // max(table.n_blocks * table.n_options, 1), 2)
    for _ in range(_MAX_ROUNDS):
        left = budget_bytes - used
        moves = _moves(table, plan, left, per_block)
        order = np.lexsort((moves.options, moves.items, -moves.gains / np.maximum(moves.more, 1)))
        taken = 0
        smallest = int(moves.more.min(initial=left + 1))
        moved: dict[int, tuple[int, float]] = {}
        for index in order.tolist():
            if left - taken < smallest:
                break
            item = int(moves.items[index])
            # What an earlier move of this round already took and gained.
            more, gain = moved.get(item, (0, 0.0))
            step = int(moves.more[index]) - more
            if 0 <= step <= left - taken and moves.gains[index] > gain:
                plan[item] = moves.options[index]
                moved[item] = (int(moves.more[index]), float(moves.gains[index]))
                taken += step
        used += taken
        if not moved:
            break
    return used


def _moves(table: CostTable, plan: NDArray[np.int8], left_bytes: int, per_block: int) -> _Moves:
    return _Moves.joined(
        table.over_blocks(lambda blocks: _best_moves(blocks, plan, left_bytes, per_block))
    )


def _used_bytes(blocks: Iterator[Block], plan: NDArray[np.int8]) -> int:
    used = 0
    for block in blocks:
        picked = plan[block.rows]
        if block.is_shared:
            counts = np.bincount(picked, minlength=block.option_bytes.shape[1])
            used += int(counts @ block.option_bytes[0])
        else:
            used += int(block.chosen(picked)[1].sum())
    return used


def _best_moves(
    blocks: Iterator[Block], plan: NDArray[np.int8], left_bytes: int, per_block: int
) -> _Moves:
    """The moves that fit, of every block and option those of most gain per byte."""
    nothing = np.empty(0, dtype=np.int64)
    found = [_Moves(nothing, nothing, nothing, np.empty(0))]
    for block in blocks:
        n_options = block.option_bytes.shape[1]
        if block.is_shared:
            steps = block.option_bytes - block.option_bytes.T
            fits = np.triu((steps >= 0) & (steps <= left_bytes), 1)
            if not fits.any():
                continue
        picked = plan[block.rows].astype(np.intp)
        own_cost, own_bytes = block.chosen(picked)
        for option in range(1, n_options):
            gain = own_cost - block.costs[:, option]
            if block.is_shared:
                if not fits[:, option].any():
                    continue
                hit = np.flatnonzero((gain > 0) & fits[picked, option])
            else:
                more = block.option_bytes[:, option] - own_bytes
                hit = np.flatnonzero((gain > 0) & (more >= 0) & (more <= left_bytes))
            if not hit.size:
                continue
            sizes = block.option_bytes[0 if block.is_shared else hit, option] - own_bytes[hit]
            if hit.size > per_block:
                rates = gain[hit] / np.maximum(sizes, 1)
                top = np.argpartition(-rates, per_block)[:per_block]
                hit, sizes = hit[top], sizes[top]
            options = np.full(hit.size, option, dtype=np.int64)
            found.append(_Moves(hit + block.start, options, sizes, gain[hit]))
    return _Moves.joined(found)
