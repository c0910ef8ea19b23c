"""Pages that are added to, shared between sequences and freed: changes of a `PagedCache`.

    joined(a, b)        every head's entries of a, then those of b; the pools one after the other
    compacted(cache)    the same entries in a pool that holds nothing else
    kept(cache, mask)   some of the entries (those that a sliding window still reaches)
    side_by_side(caches) layers as one cache of more sequences, for what is done to all of them

None changes its input, so a step that fails leaves the old pages whole.  Source: ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from sphkv_kernels.cache import PagedCache, chosen_rows
from sphkv_kernels.page_table import PageTable

CODED_AT_ONCE = 1 << 22
"""Coordinates of keys that are coded or read back together: few calls where pages are few, and no
more than some 200 MB beside them where they are many."""


def joined(first: PagedCache, second: PagedCache) -> PagedCache:
    """Both caches' pages for the same sequences; neither may have a tail."""
    a, b = first.page_table, second.page_table
    heads = torch.cat([a.head_of_entry(), b.head_of_entry()])
    order = torch.argsort(heads, stable=True)
    positions = None
    if first.positions is not None and second.positions is not None:
        positions = chosen_rows(torch.cat([first.positions, second.positions]), order)
    table = PageTable(
        torch.cat([a.offsets, b.offsets + first.pool.numel()])[order],
        torch.cat([a.tiers, b.tiers])[order],
        torch.cat([a.live_tokens, b.live_tokens])[order],
        a.starts + b.starts,
    )
    pool = torch.cat([first.pool, second.pool])
    return replace(first, pool=pool, page_table=table, positions=positions)


def side_by_side(caches: Sequence[PagedCache]) -> PagedCache:
    """One cache of all their sequences, one after the other, of one device and format; positions
    and tails are left out."""
    first = caches[0]
    tables = [cache.page_table for cache in caches]
    bytes_before = [0, *accumulate(cache.pool.numel() for cache in caches)]
    entries_before = [0, *accumulate(table.n_entries for table in tables)]
    table = PageTable(
        torch.cat([t.offsets + before for t, before in zip(tables, bytes_before, strict=False)]),
        torch.cat([t.tiers for t in tables]),
        torch.cat([t.live_tokens for t in tables]),
        torch.cat(
            [
                first.page_table.starts[:1],
                *(t.starts[1:] + n for t, n in zip(tables, entries_before, strict=False)),
            ]
        ),
    )
    return replace(
        first,
        n_sequences=sum(cache.n_sequences for cache in caches),
        pool=torch.cat([cache.pool for cache in caches]),
        page_table=table,
        positions=None,
    )


def kept(cache: PagedCache, mask: Tensor) -> PagedCache:
    """The entries where mask (n_entries) bool is True, in the same pool."""
    table = cache.page_table
    heads = table.head_of_entry()[mask]
    counts = torch.bincount(heads, minlength=cache.n_sequences * cache.n_kv_heads)
    starts = torch.zeros_like(table.starts)
    starts[1:] = counts.cumsum(0).to(torch.int32)
    chosen = PageTable(table.offsets[mask], table.tiers[mask], table.live_tokens[mask], starts)
    return replace(cache, page_table=chosen, positions=chosen_rows(cache.positions, mask))


@dataclass(frozen=True, eq=False)
class PoolMoves:
    """How a pool of the pages that some entry of a table names, each once, is made from another.

    n_bytes: of the new pool; lines: (to, from) int64 each, 16 bytes a line; offsets: (n_entries)
    int64, of the table's pages in the new pool.
    """

    n_bytes: int
    lines: tuple[tuple[Tensor, Tensor], ...]
    offsets: Tensor

    @staticmethod
    def of(cache: PagedCache) -> "PoolMoves | None":
        """None where the pool holds nothing else already.

        Pages are multiples of 16 bytes and start on one, as the page format has them.
        """
        table = cache.page_table
        sizes = torch.tensor(cache.tier_page_bytes(), device=cache.device)
        offsets, first = _unique(table.offsets)
        page_bytes = sizes[table.tiers.to(torch.int64)[first]]
        total = int(page_bytes.sum())
        if total == cache.pool.numel():
            return None
        starts = torch.cumsum(page_bytes, 0) - page_bytes
        lines = []
        for size in torch.unique(page_bytes).tolist():
            chosen = page_bytes == size
            within = torch.arange(size // 16, device=cache.device)
            to = (starts[chosen, None] // 16 + within).flatten()
            lines.append((to, (offsets[chosen, None] // 16 + within).flatten()))
        moved = starts[torch.searchsorted(offsets, table.offsets)]
        return PoolMoves(total, tuple(lines), moved)

    def made(self, pool: Tensor) -> Tensor:
        """The new pool."""
        lines = torch.empty((self.n_bytes // 16, 2), dtype=torch.int64, device=pool.device)
        source = pool.view(torch.int64).view(-1, 2)
        for to, taken in self.lines:
            lines[to] = source[taken]
        return lines.view(-1).view(torch.uint8)

    def applied(self, cache: PagedCache) -> PagedCache:
        """The same entries in the new pool."""
        table = replace(cache.page_table, offsets=self.offsets)
        return replace(cache, pool=self.made(cache.pool), page_table=table)


def compacted(cache: PagedCache) -> PagedCache:
    """A pool of the pages that some entry names, each once; the same object if it is such."""
    moves = PoolMoves.of(cache)
    return cache if moves is None else moves.applied(cache)


def _unique(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted distinct offsets and one entry that has each."""
    values, inverse = torch.unique(offsets, return_inverse=True)
    first = torch.empty_like(values)
    first[inverse] = torch.arange(offsets.numel(), device=offsets.device)
    return values, first


def tensor_bytes(cache: PagedCache) -> int:
    """Bytes of every tensor of a cache."""
    extra = (
        cache.positions,
        cache.tail_keys,
        cache.tail_values,
        cache.tail_tokens,
        cache.tail_positions,
    )
    n_bytes = cache.pool.untyped_storage().nbytes() + cache.page_table.n_bytes
    return n_bytes + sum(t.untyped_storage().nbytes() for t in extra if t is not None)
