"""Pages coded anew in smaller tiers, or dropped: of several layers together, a tier at a time.

A demoted page is read back and coded again: its error is that of both codes.  Frames differ by
layer, codes do not, so pages of all layers are read and coded by the same few calls.  Source: ours.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sphkv_cli.generation.page_store import CODED_AT_ONCE, compacted, kept, side_by_side
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.encode import encode
from sphkv_kernels.page_logits import tier_pages
from sphkv_kernels.page_table import PageTable
from sphkv_kernels.pages import place_pages


def demoted(
    caches: Sequence[PagedCache], moves: Sequence[dict[int, int]], *, uses_kernel: bool = True
) -> list[PagedCache]:
    """Pages with some in smaller tiers, or gone; a cache without moves is the same object.

    Args:
        caches: of one device and format, without tails.
        moves: of each, option by entry of its page table; 0 drops, option j is tier j - 1.
        uses_kernel: as `encode`.

    Raises:
        ValueError: a vector that its smaller code cannot hold.
    """
    smaller = [sorted(e for e, to in found.items() if to) for found in moves]
    tiers = [[found[e] - 1 for e in entries] for found, entries in zip(moves, smaller, strict=True)]
    moving = [
        compacted(kept(cache, _mask(cache, entries)))
        for cache, entries in zip(caches, smaller, strict=True)
        if entries
    ]
    sizes = caches[0].tier_page_bytes()
    device = caches[0].device
    pool = torch.empty(0, dtype=torch.uint8, device=device)
    offsets = torch.empty(0, dtype=torch.int64, device=device)
    if moving:
        every = [tier for own in tiers for tier in own]
        pool, offsets = _coded_anew(side_by_side(moving), every, uses_kernel=uses_kernel)
    results, first_entry, first_byte = [], 0, 0
    for cache, found, entries, own in zip(caches, moves, smaller, tiers, strict=True):
        if not found:
            results.append(cache)
            continue
        table, n_bytes = cache.page_table, sum(sizes[tier] for tier in own)
        where = torch.tensor(entries, dtype=torch.int64, device=device)
        to = torch.tensor(own, dtype=torch.int8, device=device)
        places = offsets[first_entry : first_entry + len(own)] - first_byte + cache.pool.numel()
        moved = replace(
            cache,
            pool=torch.cat([cache.pool, pool[first_byte : first_byte + n_bytes]]),
            page_table=replace(
                table,
                offsets=table.offsets.index_copy(0, where, places),
                tiers=table.tiers.index_copy(0, where, to),
            ),
        )
        gone = _mask(cache, [entry for entry, option in found.items() if not option])
        results.append(compacted(kept(moved, ~gone)))
        first_entry, first_byte = first_entry + len(own), first_byte + n_bytes
    return results


def _mask(cache: PagedCache, entries: Sequence[int]) -> Tensor:
    mask = torch.zeros(cache.page_table.n_entries, dtype=torch.bool)
    mask[list(entries)] = True
    return mask.to(cache.device)


def _coded_anew(
    pages: PagedCache, tiers: Sequence[int], *, uses_kernel: bool
) -> tuple[Tensor, Tensor]:
    """Every entry in its tier: (pool, offsets (n_entries)), in the order of entries."""
    sizes = pages.tier_page_bytes()
    n_bytes = torch.tensor([sizes[tier] for tier in tiers])
    ends = n_bytes.cumsum(0)
    offsets = (ends - n_bytes).to(pages.device)
    pool = torch.empty(int(ends[-1]), dtype=torch.uint8, device=pages.device)
    step = max(CODED_AT_ONCE // (pages.page_size * pages.head_dim), 1)
    for first in range(0, len(tiers), step):
        part = tiers[first : first + step]
        keys, values = _read_back(_entries(pages, first, len(part)))
        for tier in sorted(set(part)):
            chosen = [i for i, one in enumerate(part) if one == tier]
            where = torch.tensor(chosen, device=pages.device)
            coded = encode(pages.tiers[tier], keys[where], values[where], uses_kernel=uses_kernel)
            place_pages(pool, offsets[first + where], coded)
    return pool, offsets


def _entries(pages: PagedCache, first: int, n: int) -> PagedCache:
    """n entries from `first` on, as if of one head."""
    table, own = pages.page_table, slice(first, first + n)
    starts = torch.tensor([0, n], dtype=torch.int32, device=pages.device)
    chosen = PageTable(table.offsets[own], table.tiers[own], table.live_tokens[own], starts)
    return replace(pages, n_sequences=1, n_kv_heads=1, page_table=chosen)


def _read_back(pages: PagedCache) -> tuple[Tensor, Tensor]:
    """Keys, values (n_entries, page_size, d) float32 in the frame; ones in dead rows."""
    size = (pages.page_table.n_entries, pages.page_size, pages.head_dim)
    found = []
    for operand in ("key", "value"):
        rows = torch.ones(size, dtype=torch.float32, device=pages.device)
        for part in tier_pages(pages, operand):
            rows[part.entries] = part.decode()[part.page_of_entry].float()
        found.append(rows)
    live = torch.arange(pages.page_size, device=pages.device)
    dead = (live >= pages.page_table.live_tokens[:, None])[..., None]
    return found[0].masked_fill_(dead, 1.0), found[1].masked_fill_(dead, 1.0)
