"""The paged, tier-mixed cache of one layer: a pool of bytes and a page table.

``page(entry) = pool[offsets[entry] : offsets[entry] + page_bytes(tiers[entry])]``; the entries of
sequence s and KV head h are ``starts[s * n_kv_heads + h] : starts[s * n_kv_heads + h + 1]``.
A page holds up to ``page_size`` tokens of ONE KV head in ONE tier.  Attention does not depend on
the order of tokens, so a page may hold any tokens; where position matters (a sliding window,
centring before RoPE) their positions are stored.  Source: ours; paging after vLLM
(arXiv 2309.06180).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sphkv_kernels.cache_builder import (
    PageSlots,
    SequenceTokens,
    pack_pages,
    place_tokens,
    table_of,
)
from sphkv_kernels.page_table import PageTable
from sphkv_kernels.pages import PAGE_SIZES, page_bytes
from sphkv_kernels.tier import PageError, TierFormat

__all__ = ["PageTable", "PagedCache", "SequenceTokens", "build_cache"]

POSITION_DTYPES = (torch.int32, torch.uint16)


@dataclass(frozen=True)
class PagedCache:
    """The coded keys and values of one layer, for any number of sequences.

    pool: ``(n_bytes) uint8``.  positions: ``(n_entries, page_size)`` int32, or uint16 where every
    position is below 65536 (dead rows hold all bits set), or None.
    tail_keys, tail_values: the write-hot tail, ``(n_sequences, n_kv_heads, tail_size, head_dim)
    bfloat16`` in the frame, with ``tail_tokens (n_sequences) int32`` rows in use (dead rows may
    hold anything), or None.  ``tail_positions (n_sequences) int32``: position of the first tail
    token (the rest follow it), needed only where positions matter.
    """

    tiers: tuple[TierFormat, ...]
    page_size: int
    n_sequences: int
    n_kv_heads: int
    head_dim: int
    pool: Tensor
    page_table: PageTable
    positions: Tensor | None = None
    tail_keys: Tensor | None = None
    tail_values: Tensor | None = None
    tail_tokens: Tensor | None = None
    tail_positions: Tensor | None = None

    def __post_init__(self) -> None:
        table = self.page_table
        n = table.n_entries
        if self.page_size not in PAGE_SIZES:
            raise PageError(f"page_size {self.page_size}: choose one of {PAGE_SIZES}")
        expected: dict[str, tuple[Tensor, tuple[int, ...], torch.dtype]] = {
            "pool": (self.pool, (self.pool.numel(),), torch.uint8),
            "page_table.offsets": (table.offsets, (n,), torch.int64),
            "page_table.tiers": (table.tiers, (n,), torch.int8),
            "page_table.live_tokens": (table.live_tokens, (n,), torch.int16),
            "page_table.starts": (
                table.starts,
                (self.n_sequences * self.n_kv_heads + 1,),
                torch.int32,
            ),
        }
        if self.positions is not None:
            dtype = self.positions.dtype
            allowed = dtype if dtype in POSITION_DTYPES else torch.int32
            expected["positions"] = (self.positions, (n, self.page_size), allowed)
        tail = (self.tail_keys, self.tail_values, self.tail_tokens)
        if any(t is None for t in tail) and any(t is not None for t in tail):
            raise PageError("tail_keys, tail_values and tail_tokens come together or not at all")
        if self.tail_keys is not None:
            assert self.tail_values is not None and self.tail_tokens is not None
            size = self.tail_keys.shape[2]
            tail_shape = (self.n_sequences, self.n_kv_heads, size, self.head_dim)
            expected["tail_keys"] = (self.tail_keys, tail_shape, torch.bfloat16)
            expected["tail_values"] = (self.tail_values, tail_shape, torch.bfloat16)
            expected["tail_tokens"] = (self.tail_tokens, (self.n_sequences,), torch.int32)
        if self.tail_positions is not None:
            expected["tail_positions"] = (self.tail_positions, (self.n_sequences,), torch.int32)
        for name, (tensor, shape, dtype) in expected.items():
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise PageError(
                    f"cache.{name} is {tuple(tensor.shape)} {tensor.dtype}, "
                    f"expected {shape} {dtype}"
                )
            if tensor.device != self.pool.device:
                raise PageError(
                    f"cache.{name} lies on {tensor.device}, the pool on {self.pool.device}; "
                    "move the whole cache with .to(device)"
                )

    @property
    def device(self) -> torch.device:
        return self.pool.device

    def tier_page_bytes(self) -> tuple[int, ...]:
        """Bytes of one page of every tier."""
        return tuple(page_bytes(tier, self.head_dim, self.page_size) for tier in self.tiers)

    def check(self) -> None:
        """Read the whole table back; raise PageError on the first entry that cannot be right.

        Live entries lie inside the pool on a 16-byte boundary, name an existing tier and at most
        page_size tokens; the starts rise from 0 to the number of entries.
        """
        table = self.page_table
        starts = table.starts.tolist()
        if starts[0] != 0 or starts[-1] != table.n_entries or sorted(starts) != starts:
            raise PageError("page_table.starts must rise from 0 to the number of entries")
        sizes = self.tier_page_bytes()
        rows = zip(
            table.offsets.tolist(), table.tiers.tolist(), table.live_tokens.tolist(), strict=True
        )
        for entry, (offset, tier, live) in enumerate(rows):
            if live == 0:
                continue
            if not 0 < live <= self.page_size:
                raise PageError(f"entry {entry}: {live} live tokens on a page of {self.page_size}")
            if not 0 <= tier < len(self.tiers):
                raise PageError(f"entry {entry}: tier {tier} of {len(self.tiers)}")
            if offset < 0 or offset % 16 or offset + sizes[tier] > self.pool.numel():
                raise PageError(
                    f"entry {entry}: page at byte {offset} of {sizes[tier]} bytes does not lie on "
                    f"a 16-byte boundary inside the pool of {self.pool.numel()} bytes"
                )
        if self.tail_tokens is not None and self.tail_keys is not None:
            size = self.tail_keys.shape[2]
            if self.tail_tokens.numel() and not (
                int(self.tail_tokens.min()) >= 0 and int(self.tail_tokens.max()) <= size
            ):
                raise PageError(f"tail_tokens must lie in 0..{size}")

    def to(self, device: torch.device | str) -> "PagedCache":
        """The same cache on another device."""

        def moved(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        return replace(
            self,
            pool=self.pool.to(device),
            page_table=self.page_table.to(device),
            positions=moved(self.positions),
            tail_keys=moved(self.tail_keys),
            tail_values=moved(self.tail_values),
            tail_tokens=moved(self.tail_tokens),
            tail_positions=moved(self.tail_positions),
        )

    def select_sequences(self, sequences: list[int]) -> "PagedCache":
        """A cache whose sequence i is sequence ``sequences[i]`` of this one.

        Pages are shared, not copied; a sequence may be named many times (many queries against one
        context) or not at all.
        """
        for s in sequences:
            if not 0 <= s < self.n_sequences:
                raise PageError(f"sequence {s}: the cache holds {self.n_sequences}")
        chosen = torch.tensor(sequences, dtype=torch.int64, device=self.device)
        kv_heads = torch.arange(self.n_kv_heads, device=self.device)
        heads = (chosen[:, None] * self.n_kv_heads + kv_heads).reshape(-1)
        table, entries = self.page_table.select(heads)

        return replace(
            self,
            n_sequences=len(sequences),
            page_table=table,
            positions=chosen_rows(self.positions, entries),
            tail_keys=chosen_rows(self.tail_keys, chosen),
            tail_values=chosen_rows(self.tail_values, chosen),
            tail_tokens=chosen_rows(self.tail_tokens, chosen),
            tail_positions=chosen_rows(self.tail_positions, chosen),
        )


def build_cache(
    tiers: Sequence[TierFormat],
    page_size: int,
    sequences: Sequence[SequenceTokens],
    *,
    dead_rows: Literal["zero", "poison"] = "zero",
    position_dtype: torch.dtype = torch.int32,
) -> PagedCache:
    """Encode and lay out tokens whose tier and page are decided.

    dead_rows: what the unused rows of partial pages hold: zeros, or "poison" (NaN wherever the
    format has a floating-point field), for tests that such rows are never read.  Positions are
    stored as position_dtype (one of POSITION_DTYPES) when every sequence has them.  Raises
    PageError on shapes that do not fit, a position that does not fit its dtype, a page of two tiers
    or with more tokens than page_size, and on NaN or Inf in a kept token.
    """
    if not sequences:
        raise PageError("a cache needs at least one sequence (it may have no tokens)")
    n_kv_heads, head_dim = sequences[0].keys.shape[1:]
    for index, tokens in enumerate(sequences):
        _check_tokens(index, tokens, n_kv_heads, head_dim)
    slots = place_tokens(sequences, len(tiers), page_size)
    pool, offsets = pack_pages(tiers, page_size, sequences, slots, dead_rows)
    positions: Tensor | None = None
    if all(tokens.positions is not None for tokens in sequences):
        positions = _stored_positions(sequences, slots, page_size, position_dtype)
    return PagedCache(
        tiers=tuple(tiers),
        page_size=page_size,
        n_sequences=len(sequences),
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        pool=pool,
        page_table=table_of(slots, offsets, len(sequences) * n_kv_heads),
        positions=positions,
    )


def _stored_positions(
    sequences: Sequence[SequenceTokens], slots: PageSlots, page_size: int, dtype: torch.dtype
) -> Tensor:
    """``(n_entries, page_size)`` in dtype, all bits set where no token is."""
    if dtype not in POSITION_DTYPES:
        raise PageError(f"positions cannot be stored as {dtype}: choose int32 or uint16")
    flat = torch.cat([t.positions for t in sequences if t.positions is not None]).to(torch.int64)
    limit = 1 << (16 if dtype == torch.uint16 else 31)
    if flat.numel() and not (int(flat.min()) >= 0 and int(flat.max()) < limit):
        raise PageError(f"a position lies outside 0..{limit - 1}, it cannot be stored as {dtype}")
    n_entries = slots.entry_tiers.shape[0]
    positions = torch.full((n_entries, page_size), -1, dtype=torch.int64, device=flat.device)
    n_tokens = torch.tensor([s.keys.shape[0] for s in sequences], device=flat.device)
    first = torch.cumsum(n_tokens, 0) - n_tokens
    positions[slots.entry, slots.row] = flat[first[slots.sequence] + slots.token]
    return (positions & 0xFFFF if dtype == torch.uint16 else positions).to(dtype)


def _check_tokens(index: int, tokens: SequenceTokens, n_kv_heads: int, head_dim: int) -> None:
    n_tokens = tokens.keys.shape[0]
    expected = {
        "keys": (tokens.keys, (n_tokens, n_kv_heads, head_dim)),
        "values": (tokens.values, (n_tokens, n_kv_heads, head_dim)),
        "tier_of_token": (tokens.tier_of_token, (n_tokens, n_kv_heads)),
        "page_of_token": (tokens.page_of_token, (n_tokens, n_kv_heads)),
    }
    if tokens.positions is not None:
        expected["positions"] = (tokens.positions, (n_tokens,))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise PageError(f"sequence {index}: {name} is {tuple(tensor.shape)}, expected {shape}")


def chosen_rows(rows: Tensor | None, which: Tensor) -> Tensor | None:
    """``rows[which]`` for a mask or indices, None for None; CUDA itself does not index uint16."""
    if rows is None or rows.dtype != torch.uint16:
        return None if rows is None else rows[which]
    return rows.view(torch.int16)[which].view(torch.uint16)
