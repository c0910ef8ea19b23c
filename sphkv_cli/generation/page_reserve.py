"""Room for the next pages: dead slots at the end of every row, planned for, filled in place.

A decode plan serves a page table as it is; sealing a page would make a new one, which costs the
host far more than the page.  So the table and the plan hold slots without a token, which a seal
brings to life by two writes: the page's bytes and its number of tokens.  Until then the kernel
reads them as pages whose tokens are all dead.  Source: ours.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sphkv_cli.generation.page_store import PoolMoves, joined, kept
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.decode import AttentionPlan, plan
from sphkv_kernels.page_table import PageTable

_SHARE = 32
_LEAST = 16


def slots_for(n_pages: int) -> int:
    """Slots of a row of so many pages: a 32nd more, and at least 16.

    Dead slots are read at every step, and new ones take the time of some ten steps of a small
    cache.
    """
    return max(-(-n_pages // _SHARE), _LEAST)


@dataclass(frozen=True, eq=False)
class PageReserve:
    """Pages with their dead slots, and the plan that reads both.

    pages: every row's last n_slots entries are slots; plan: of the kernel, else None.
    entries: (n_sequences, n_kv_heads, n_slots) int64 of the page table; records: likewise, of the
    plan.  block: (n_sequences, n_kv_heads, n_slots, page bytes), the slots' bytes in the pool.
    is_twin: table, entries and records are another layer's, laid out alike; a seal that revives
    slots there revives them here.
    """

    pages: PagedCache
    plan: AttentionPlan | None
    entries: Tensor
    records: Tensor | None
    block: Tensor
    is_twin: bool

    @property
    def n_slots(self) -> int:
        """Slots of every row."""
        return self.entries.shape[2]

    def fill(self, pages: Tensor, sequences: list[int], first: int, positions: Tensor) -> None:
        """Bring slots to life, without a word to the host.

        Args:
            pages: (n_chosen, n_kv_heads, n, page bytes) uint8, full pages of the chosen sequences.
            sequences: the chosen; first: of their slots; positions: (n_chosen, n page_size), each
            page's following one another.
        """
        n, size = pages.shape[2], self.pages.page_size
        for i, s in _runs(sequences):
            span = slice(i, i + len(s)), slice(s[0], s[-1] + 1)
            self.block[span[1], :, first : first + n].copy_(pages[span[0]])
            if self.is_twin:
                continue
            entries = self.entries[span[1], :, first : first + n].flatten()
            self.pages.page_table.live_tokens.index_fill_(0, entries, size)
            if self.records is not None and self.plan is not None:
                records = self.records[span[1], :, first : first + n].flatten()
                self.plan.work.records[:, 1].index_fill_(0, records, size)
            if self.pages.positions is not None:
                rows = positions[span[0]].to(torch.int32).view(len(s), 1, n, size)
                rows = rows.expand(-1, self.pages.n_kv_heads, -1, -1).reshape(-1, size)
                _put(self.pages.positions, entries, rows)
                if self.plan is not None and self.plan.work.positions is not None:
                    # Their offsets are those of the slots, which follow one another too.
                    self.plan.work.positions.first.index_copy_(0, records, rows[:, 0])


class SlotMaker:
    """Makes the reserves of a cache's layers, one after the other.

    Layers laid out like the one before them, as those of a uniform cache are, share what they can:
    table, plan, and which bytes of the pool are left out, for which the device is asked many times.
    """

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self._last: _Made | None = None

    def reserve(self, pages: PagedCache, tier: int, group_size: int | None) -> PageReserve:
        """Slots of one tier behind the live pages; what else the pool holds is left out.

        Args:
            group_size: query heads per KV head where the kernel reads, else None.
        """
        if self._last is not None and self._last.was_of(pages):
            return self._last.twin(pages)
        live = pages
        if bool((pages.page_table.live_tokens == 0).any()):
            live = kept(pages, pages.page_table.live_tokens > 0)
        moves = PoolMoves.of(live)
        if moves is not None:
            live = moves.applied(live)
        reserve = self._with_slots(live, tier, group_size)
        # Pages with positions have no twins: what was moved, as large as the pool, is not kept.
        self._last = None
        if pages.positions is None:
            self._last = _Made(reserve, pages.page_table, pages.pool.numel(), moves)
        return reserve

    def _with_slots(self, live: PagedCache, tier: int, group_size: int | None) -> PageReserve:
        heads = (live.n_sequences, live.n_kv_heads)
        whole = joined(live, _dead(live, tier, self.n_slots))
        ends = whole.page_table.starts[1:].to(torch.int64).view(*heads, 1)
        entries = ends - self.n_slots + torch.arange(self.n_slots, device=live.device)
        page_bytes = live.tier_page_bytes()[tier]
        block = whole.pool[live.pool.numel() :].view(*heads, self.n_slots, page_bytes)
        if group_size is None:
            return PageReserve(whole, None, entries, None, block, is_twin=False)
        full = whole.page_table.live_tokens.clone()
        full[entries.flatten()] = whole.page_size
        as_if = replace(whole, page_table=replace(whole.page_table, live_tokens=full))
        made = plan(as_if, group_size, check=False)
        record_of_entry = torch.empty_like(made.work.entries, dtype=torch.int64)
        numbers = torch.arange(record_of_entry.numel(), device=live.device)
        record_of_entry[made.work.entries.to(torch.int64)] = numbers
        records = record_of_entry[entries]
        made.work.records[records.flatten(), 1] = 0
        return PageReserve(whole, made, entries, records, block, is_twin=False)


@dataclass(frozen=True, eq=False)
class _Made:
    """A reserve, and the table and pool that it was made of (without positions), by `moves`."""

    reserve: PageReserve
    table: PageTable
    pool_bytes: int
    moves: PoolMoves | None

    def was_of(self, pages: PagedCache) -> bool:
        """Whether it was made of pages laid out as these: all but its bytes is theirs."""
        if pages.positions is not None or pages.pool.numel() != self.pool_bytes:
            return False
        a, b = self.table, pages.page_table
        if a is b:
            return True
        pairs = ((a.starts, b.starts), (a.offsets, b.offsets), (a.tiers, b.tiers))
        return all(torch.equal(*pair) for pair in (*pairs, (a.live_tokens, b.live_tokens)))

    def twin(self, pages: PagedCache) -> PageReserve:
        """The reserve of these pages: its own bytes, and all else shared."""
        like = self.reserve
        live = pages.pool if self.moves is None else self.moves.made(pages.pool)
        pool = torch.cat([live, torch.zeros_like(like.block).flatten()])
        whole = replace(pages, pool=pool, page_table=like.pages.page_table)
        block = pool[live.numel() :].view(like.block.shape)
        shared = None
        if like.plan is not None:
            table = like.plan.cache.page_table
            shared = like.plan.for_twin(replace(whole, page_table=table))
        return PageReserve(whole, shared, like.entries, like.records, block, is_twin=True)


def _dead(pages: PagedCache, tier: int, n_slots: int) -> PagedCache:
    device, n_rows = pages.device, pages.n_sequences * pages.n_kv_heads
    page_bytes = pages.tier_page_bytes()[tier]
    numbers = torch.arange(n_rows * n_slots, device=device)
    table = PageTable(
        numbers * page_bytes,
        torch.full_like(numbers, tier, dtype=torch.int8),
        torch.zeros_like(numbers, dtype=torch.int16),
        torch.arange(n_rows + 1, device=device, dtype=torch.int32) * n_slots,
    )
    positions = None
    if pages.positions is not None:
        following = torch.arange(pages.page_size, device=device)  # as those of a sealed page will
        positions = following.to(pages.positions.dtype).expand(n_rows * n_slots, -1).contiguous()
    pool = torch.zeros(n_rows * n_slots * page_bytes, dtype=torch.uint8, device=device)
    return replace(pages, pool=pool, page_table=table, positions=positions)


def _runs(sequences: list[int]) -> list[tuple[int, list[int]]]:
    """Neighbours among ascending numbers, with the place of each run's first."""
    runs: list[tuple[int, list[int]]] = []
    for i, s in enumerate(sequences):
        if runs and runs[-1][1][-1] + 1 == s:
            runs[-1][1].append(s)
        else:
            runs.append((i, [s]))
    return runs


def _put(positions: Tensor, entries: Tensor, rows: Tensor) -> None:
    """CUDA itself does not index uint16."""
    if positions.dtype == torch.uint16:
        positions.view(torch.int16).index_copy_(0, entries, rows.to(torch.int16))
    else:
        positions.index_copy_(0, entries, rows)
