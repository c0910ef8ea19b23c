"""Cutting pages that lie end to end into shares, one per block, by the time of the slowest block.

    time of a block = cost of its pages (`page_cost`) + PART_COST parts + SEGMENT_COST segments

in the unit of `page_cost`. Two cuts are tried: at any page, and at ends of rows, which saves blocks
a second start and merge. Source: ours; cuts of equal cost after FlashInfer (arXiv 2501.01005).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PART_COST = 205_000
"""What a block could read while it starts and ends one part more (8.8 us at 23.4 kB/us, measured
as in `page_cost`, before a merge took 1 to 3 us less)."""
SEGMENT_COST = 15_000
"""Likewise for one more tier (0.6 us): its first loads have nothing to hide behind."""
WORTH_SPLITTING, WORTH_SPLITTING_BY_MEMORY = 0.95, 0.9
"""A cut across rows must promise this much: measured (with costs of pages a tenth off), those that
promised 2 and 3 % of mixed caches gained nothing, one of 8 % did. Where memory is the limit, idle
blocks cost nothing (128 aligned blocks 189 us, 132 unaligned ones 201 us, 4 x 8 x 131072 x 8)."""
Ints = npt.NDArray[np.int64]


def assign_blocks(
    rows: Ints, tiers: Ints, page_cost: Ints, n_rows: int, n_blocks: int, worth: float
) -> Ints:
    """(n_pages): the block of every page, non-decreasing.

    The best of two cuts by the time of the slowest block, where a part of a row costs as much as
    PART_COST and a segment as SEGMENT_COST: wherever that is least, and shares that never mix rows
    (or, with more rows than blocks, never split one). The first must take less than `worth` of the
    time of the second.
    """
    if not rows.size:
        return np.zeros(0, dtype=np.int64)
    new_row = np.r_[True, np.diff(rows) != 0]
    new_tier = new_row | np.r_[True, np.diff(tiers) != 0]
    cost = page_cost + PART_COST * new_row + SEGMENT_COST * new_tier
    row_cost = np.zeros(n_rows, dtype=np.int64)
    if n_rows <= n_blocks:  # every part costs the same beside its bytes
        np.add.at(row_cost, rows, page_cost)
        parts = _parts_of_rows(row_cost, n_blocks)
        before = np.cumsum(row_cost) - row_cost
        # A page belongs to the part in whose share its middle lies.
        inside = np.cumsum(page_cost) - page_cost / 2 - before[rows]
        share = (inside * parts[rows] / row_cost[rows]).astype(np.int64)
        aligned = (np.cumsum(parts) - parts)[rows] + share
    else:
        np.add.at(row_cost, rows, cost)
        packed = _pack(row_cost, np.zeros_like(row_cost), n_blocks, float(row_cost.sum()))
        assert packed is not None  # one block has room for all
        aligned = packed[rows]
    limit = worth * _slowest(aligned, rows, tiers, page_cost)
    if int(cost.sum()) >= limit * n_blocks:  # no cut is that much better
        return aligned
    anywhere = _pack(cost, PART_COST * ~new_row + SEGMENT_COST * ~new_tier, n_blocks, limit)
    return aligned if anywhere is None else anywhere


def _pack(cost: Ints, start_cost: Ints, n_blocks: int, limit: float) -> Ints | None:
    """Block of every item, items in order, the fullest block as small as can be (to .5 %) and below
    `limit`, or None; an item that begins a block costs start_cost more."""
    ends = np.cumsum(cost)
    before = ends - cost + 0.0 - start_cost

    def starts_of(shares: npt.NDArray[np.float64]) -> Ints:
        """(n_blocks + 1, n_shares): where blocks that take no more than a share begin."""
        starts = np.zeros((n_blocks + 1, shares.size), dtype=np.int64)
        for block in range(n_blocks):
            first = starts[block]
            inside = np.minimum(first, cost.size - 1)
            fill = np.searchsorted(ends, before[inside] + shares, "right")
            starts[block + 1] = np.where(first < cost.size, np.maximum(fill, first + 1), first)
        return starts

    low, high = max(float(ends[-1]) / n_blocks, float((cost + start_cost).max())), limit
    if high < low:
        return None
    starts = starts_of(np.array([high]))[:, 0]
    if starts[-1] < cost.size:
        return None
    while high > 1.005 * low:
        shares = np.geomspace(low, high, 64)
        found = starts_of(shares)
        best = int(np.flatnonzero(found[-1] >= cost.size)[0])
        starts, low, high = found[:, best], shares[max(best - 1, 0)], shares[best]
    return np.searchsorted(starts[1:], np.arange(cost.size), "right").astype(np.int64)


def _slowest(block: Ints, rows: Ints, tiers: Ints, page_cost: Ints) -> float:
    """Bytes of the slowest block, its parts and segments included."""
    new_part = np.r_[True, (np.diff(block) != 0) | (np.diff(rows) != 0)]
    new_segment = new_part | np.r_[True, np.diff(tiers) != 0]
    cost = page_cost + PART_COST * new_part + SEGMENT_COST * new_segment
    return float(np.bincount(block, weights=cost).max())


def _parts_of_rows(row_cost: Ints, n_blocks: int) -> Ints:
    """Parts per row, n_blocks in all at most, such that the largest part is as small as can be."""
    low, high = float(row_cost.sum()) / n_blocks, float(row_cost.max())
    for _ in range(50):
        share = (low + high) / 2
        if np.maximum(np.ceil(row_cost / share), 1).sum() <= n_blocks:
            high = share
        else:
            low = share
    return np.maximum(np.ceil(row_cost / high), 1).astype(np.int64)
