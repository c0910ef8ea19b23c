"""Work of every block of a persistent grid: which pages of which rows, and where it finds them.

    a part = pages of one (sequence, KV head) in one block;   a segment = those of one tier

Pages of a (sequence, KV head), a row, are sorted by tier, laid end to end with all the others, and
cut (`page_cut`); blocks that share the pages of a tier of a row read them in turn. A row cut into
several parts is merged inside the launch by the block that arrives last. The plan depends on the
page table and the grid (and, where a position term is asked for, on the positions): it is made once
and serves every decode step until pages are added (the tail grows without a new plan).
Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sphkv_kernels.cache import PagedCache
from sphkv_kernels.page_cost import memory_speed, page_costs
from sphkv_kernels.page_cut import WORTH_SPLITTING, WORTH_SPLITTING_BY_MEMORY, assign_blocks
from sphkv_kernels.page_positions import PagePositions
from sphkv_kernels.tier import PageError

FIRST, LAST, TAIL = 1, 2, 4
FIELDS, FIRST_PAGES = 8, 24
SEGMENT_INTS, HEAD_INTS = FIELDS + FIRST_PAGES, FIELDS + 4 + FIRST_PAGES
"""Of `Segment` in params.cuh, and pages whose places come with it (the first tiles of 12 warps, on
pages of 16 tokens)."""
MAX_OFFSET = 16 * (1 << 32)
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DecodePlan:
    """Work of every block, on the cache's device.

    records (n_pages, 2) int32: byte offset / 16, live tokens, sorted by (row, tier, block); entries
    (n_pages) int32: the page-table entry of each record; positions: those of its tokens, None where
    the cache has none; heads (n_blocks, HEAD_INTS) int32: the first segment of every block, the
    range of its others in segments (n, SEGMENT_INTS) int32 and its second code; a segment comes
    with the places of its first pages; n_parts: partial results of rows cut into several;
    code_bytes: bytes of all pages; used_tiers: the cache's tiers that occur, which segments number
    from 0 (a kernel is built for these alone); tier_costs: cost of all pages of each of them;
    n_starts: how many times a block begins a row.
    """

    records: Tensor
    entries: Tensor
    positions: PagePositions | None
    heads: Tensor
    segments: Tensor
    n_blocks: int
    n_parts: int
    n_rows: int
    code_bytes: int
    used_tiers: tuple[int, ...]
    tier_costs: tuple[int, ...]
    n_starts: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the plan that every launch reads: the metadata of the cache."""
        tensors = (self.records, self.heads, self.segments)
        return sum(t.numel() * t.element_size() for t in tensors)


def make_plan(cache: PagedCache, n_blocks: int, *, check: bool = True) -> DecodePlan:
    """Plan a decode of `cache` on `n_blocks` blocks (one per multiprocessor).

    check: read the page table back and refuse offsets, tiers or counts that cannot be right. The
    page table is copied to the host either way.

    Raises:
        PageError: no block, nothing to decode, a pool that a plan cannot address or loads cannot
            read, a head_dim that the kernel does not have, or what check found.
    """
    if n_blocks < 1:
        raise PageError(f"n_blocks {n_blocks}: a plan needs at least one block")
    if not cache.n_sequences * cache.n_kv_heads:
        raise PageError("the cache holds no sequence, or no KV head: there is nothing to decode")
    cache.require_aligned()
    if check:
        cache.check()
    if cache.pool.numel() > MAX_OFFSET:
        raise PageError("the pool is larger than the 64 GiB that a plan can address")
    table = cache.page_table
    n_rows = cache.n_sequences * cache.n_kv_heads
    live = table.live_tokens.cpu().numpy().astype(np.int64)
    tiers = table.tiers.cpu().numpy().astype(np.int64)
    starts = table.starts.cpu().numpy().astype(np.int64)
    rows = np.repeat(np.arange(n_rows), starts[1:] - starts[:-1])
    kept = np.flatnonzero(live > 0)  # dead slots hold anything: they never reach the device
    order = kept[np.lexsort((tiers[kept], rows[kept]))]
    row, tier = rows[order], tiers[order]  # of every page, also when segments take pages in turn
    page_bytes = np.asarray(cache.tier_page_bytes(), dtype=np.int64)[tier]
    n_pages = np.bincount(tier, minlength=len(cache.tiers))
    used = np.flatnonzero(n_pages)
    tier_of_page = np.searchsorted(used, tier)
    cost_of_tier, memory_binds = page_costs(cache, n_pages.tolist(), memory_speed(cache.device))
    costs = np.asarray(cost_of_tier, dtype=np.int64)[tier]
    worth = WORTH_SPLITTING_BY_MEMORY if memory_binds else WORTH_SPLITTING
    block = assign_blocks(row, tier_of_page, costs, n_rows, n_blocks, worth)
    pages = np.stack([block, row, tier_of_page])
    first = _first_of_segments(pages)
    order = order[_in_turn(pages, first)]
    offsets = table.offsets.cpu().numpy()[order] // 16
    segments, block_starts, n_parts = _cut(pages, first, n_rows, n_blocks)
    with_tables = np.array([cache.tiers[index].kind == "spherical" for index in used], dtype=bool)
    heads, others = _split_heads(
        segments, _first_pages(segments, offsets), block_starts, with_tables
    )
    records = np.stack([offsets.astype(np.uint32), live[order].astype(np.uint32)], axis=1)
    if not records.shape[0]:
        records = np.zeros((1, 2), dtype=np.uint32)  # never read; a null pointer would be

    def on_device(array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(cache.device)

    entries = on_device(order.astype(np.int32))
    return DecodePlan(
        records=on_device(records.view(np.int32)),
        entries=entries,
        positions=PagePositions.of(cache, entries),
        heads=on_device(heads),
        segments=on_device(others),
        n_blocks=n_blocks,
        n_parts=n_parts,
        n_rows=n_rows,
        code_bytes=int(page_bytes.sum()),
        used_tiers=tuple(used.tolist()),
        tier_costs=tuple(int(costs[tier == one].sum()) for one in used),
        n_starts=int((segments[:, 4] & FIRST != 0).sum()),
    )


def _first_of_segments(pages: Ints) -> Ints:
    """Number of every segment's first page, of pages ``(3, n)``: (block, row, tier) of each."""
    changes = (np.diff(pages, axis=1) != 0).any(axis=0)
    return np.flatnonzero(np.r_[True, changes][: pages.shape[1]])


def _in_turn(pages: Ints, first: Ints) -> Ints:
    """Which page takes each place, such that the blocks that share the pages of a (row, tier) take
    them in turn: blocks that begin together stay near one another in memory, where shares of equal
    size would lie a power of two apart."""
    _, rows, tiers = pages
    place = np.arange(rows.size)
    counts = np.diff(np.r_[first, rows.size])
    done = (place - np.repeat(first, counts) + 0.5) / np.repeat(counts, counts)
    page = np.empty_like(place)
    page[np.lexsort((done, tiers, rows))] = place
    return page


def _cut(pages: Ints, first: Ints, n_rows: int, n_blocks: int) -> tuple[Ints, Ints, int]:
    """``(segments (n, FIELDS), block_starts (n_blocks + 1), n_parts)`` of pages ``(3, n)``, (block,
    row, tier) of each, and the first ones of segments.

    Rows without a page still get a segment: its tail, or an empty result, has to be written.
    """
    block, rows, tiers = pages
    counts = np.diff(np.r_[first, rows.size])
    present = np.unique(rows)
    empty = np.setdiff1d(np.arange(n_rows), present)
    seg_block = np.r_[block[first], empty * n_blocks // max(n_rows, 1)]
    seg_row = np.r_[rows[first], empty]
    seg_tier = np.r_[tiers[first], np.full(empty.size, -1)]
    seg_first = np.r_[first, np.zeros(empty.size, dtype=np.int64)]
    seg_count = np.r_[counts, np.zeros(empty.size, dtype=np.int64)]
    order = np.lexsort((seg_tier, seg_row, seg_block))
    seg_block, seg_row = seg_block[order], seg_row[order]
    seg_tier, seg_first, seg_count = seg_tier[order], seg_first[order], seg_count[order]
    # Segments of one (block, row) form a part.
    new_part = np.r_[True, (np.diff(seg_block) != 0) | (np.diff(seg_row) != 0)]
    last_of_part = np.r_[new_part[1:], True]
    part_row = seg_row[new_part]
    parts_of_row = np.bincount(part_row, minlength=n_rows)
    by_row = np.argsort(part_row, kind="stable")
    part_in_row = np.empty(part_row.size, dtype=np.int64)
    part_in_row[by_row] = np.arange(part_row.size) - np.repeat(
        np.cumsum(parts_of_row) - parts_of_row, parts_of_row
    )
    # Only rows of several parts use the buffers of partial results.
    stored = np.where(parts_of_row > 1, parts_of_row, 0)
    base = np.cumsum(stored) - stored
    part_of_segment = np.cumsum(new_part) - 1
    final = last_of_part & (part_in_row[part_of_segment] == parts_of_row[seg_row] - 1)
    segments = np.stack(
        [
            seg_row,
            seg_tier,
            seg_first,
            seg_count,
            FIRST * new_part + LAST * last_of_part + TAIL * final,
            part_in_row[part_of_segment],
            parts_of_row[seg_row],
            base[seg_row],
        ],
        axis=1,
    )
    block_starts = np.searchsorted(seg_block, np.arange(n_blocks + 1))
    return segments, block_starts, int(stored.sum())


def _first_pages(segments: Ints, offsets: Ints) -> npt.NDArray[np.int32]:
    """``(n_segments, FIRST_PAGES)``: byte offset / 16 of the first pages of every segment, the last
    one repeated: what a block can ask for before it has read a record."""
    first, count = segments[:, 2], segments[:, 3]
    inside = np.minimum(np.arange(FIRST_PAGES), np.maximum(count, 1)[:, None] - 1)
    places = np.append(offsets, 0)[np.where(count, first, offsets.size)[:, None] + inside]
    as_stored: npt.NDArray[np.int32] = places.astype(np.uint32).view(np.int32)
    return as_stored


def _split_heads(
    segments: Ints,
    first_pages: npt.NDArray[np.int32],
    block_starts: Ints,
    with_tables: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Every block's first segment where the block finds it without a detour, and the others.

    With the first segment come the range of the block's others and the next tier that it reads
    `with_tables` (a bool per used tier), -1 if there is none.

    A block without work gets a segment of no pages and no flags.
    """
    n_blocks = block_starts.size - 1
    busy = block_starts[1:] > block_starts[:-1]
    heads = np.zeros((n_blocks, HEAD_INTS), dtype=np.int32)
    heads[:, 1] = -1
    heads[busy, :FIELDS] = segments[block_starts[:-1][busy]]
    heads[busy, FIELDS + 4 :] = first_pages[block_starts[:-1][busy]]
    is_head = np.zeros(segments.shape[0], dtype=bool)
    is_head[block_starts[:-1][busy]] = True
    others = np.concatenate([segments.astype(np.int32), first_pages], axis=1)[~is_head]
    before = np.cumsum(~is_head) - ~is_head  # others before each segment
    padded = np.append(before, others.shape[0])
    heads[:, FIELDS] = padded[block_starts[:-1]]
    heads[:, FIELDS + 1] = padded[block_starts[1:]]
    block, tier = np.repeat(np.arange(n_blocks), np.diff(block_starts)), segments[:, 1]
    has_tables = np.append(with_tables, False)[tier]  # tier -1: no pages
    is_second = np.flatnonzero(has_tables & (tier != heads[block, 1]))
    with_second, first_of_them = np.unique(block[is_second], return_index=True)
    heads[:, FIELDS + 2] = -1
    heads[with_second, FIELDS + 2] = tier[is_second[first_of_them]]
    if not others.shape[0]:
        others = np.zeros((1, SEGMENT_INTS), dtype=np.int32)  # never read; null would be
    return heads, others
