"""From tokens with a tier and a page each to a `PagedCache`.

The full pages of a tier are encoded in one call, on a GPU by its kernel, and those with dead rows
in another; pages lie in the pool in the order of the entries.  Source: ours.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.cache import POSITION_DTYPES, PagedCache
from sphkv_kernels.code_fields import radius_bits
from sphkv_kernels.encode import encode
from sphkv_kernels.layout import Operand
from sphkv_kernels.page_slots import PageSlots, SequenceTokens, place_tokens, table_of
from sphkv_kernels.page_table import PageTable
from sphkv_kernels.pages import pack_region, page_bytes, place_pages
from sphkv_kernels.tier import PageError, RegionFormat, TierFormat
from sphkv_kernels.vectors import encode_vectors, placed_rows, poisoned_rows, reshape_rows

MOST_TIERS = 128
"""A page table stores a tier as int8."""
INTEGER_DTYPES = (
    torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64,
)  # fmt: skip


def build_cache(
    tiers: Sequence[TierFormat],
    page_size: int,
    sequences: Sequence[SequenceTokens],
    *,
    dead_rows: Literal["zero", "poison"] = "zero",
    position_dtype: torch.dtype = torch.int32,
    uses_kernel: bool = True,
) -> PagedCache:
    """Encode and lay out tokens whose tier and page are decided.

    dead_rows: what the unused rows of partial pages hold: zeros, or "poison" (NaN wherever the
    format has a floating-point field), for tests that such rows are never read.  Positions are
    stored as position_dtype (one of POSITION_DTYPES) when every sequence has them.  uses_kernel:
    False for torch operations where tokens on a GPU would be encoded by its kernel.

    Raises:
        PageError: shapes and dtypes that do not fit, a position that does not fit its dtype, a page
            of two tiers or with more tokens than page_size.
        ValueError: NaN, Inf or what a tier cannot hold in a kept token.
    """
    if not sequences:
        raise PageError("a cache needs at least one sequence (it may have no tokens)")
    if len(tiers) > MOST_TIERS:
        raise PageError(f"{len(tiers)} tiers: a page table numbers up to {MOST_TIERS}")
    of_token = tuple(sequences[0].keys.shape[1:])
    for index, tokens in enumerate(sequences):
        _check_tokens(index, tokens, of_token)
    n_kv_heads, head_dim = of_token
    slots = place_tokens(sequences, len(tiers), page_size)
    pool, offsets = pack_pages(
        tiers, page_size, sequences, slots, dead_rows, uses_kernel=uses_kernel
    )
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


def build_caches(
    tiers: Sequence[TierFormat],
    page_size: int,
    layers: Sequence[Sequence[SequenceTokens]],
    *,
    position_dtype: torch.dtype = torch.int32,
    uses_kernel: bool = True,
) -> list[PagedCache]:
    """As `build_cache` of every layer; what they seal in one tier is encoded in one call."""
    found: dict[int, PagedCache] = {}
    for with_positions in (True, False):
        chosen = [
            index
            for index, sequences in enumerate(layers)
            if all(tokens.positions is not None for tokens in sequences) == with_positions
        ]
        if not chosen:
            continue
        whole = build_cache(
            tiers,
            page_size,
            [tokens for index in chosen for tokens in layers[index]],
            position_dtype=position_dtype,
            uses_kernel=uses_kernel,
        )
        found |= zip(chosen, _parts(whole, [len(layers[i]) for i in chosen]), strict=True)
    return [found[index] for index in range(len(layers))]


def _parts(whole: PagedCache, n_sequences: Sequence[int]) -> list[PagedCache]:
    """So many sequences each, in memory of their own; pages lie in the order of entries."""
    if len(n_sequences) == 1:
        return [whole]
    table = whole.page_table
    rows = [0, *(whole.n_kv_heads * n for n in accumulate(n_sequences))]
    entries = table.starts[rows].tolist()
    ends = torch.cat([table.offsets, table.offsets.new_tensor([whole.pool.numel()])])
    places = ends[entries].tolist()
    parts = []
    for i, n in enumerate(n_sequences):
        own, held = slice(entries[i], entries[i + 1]), slice(places[i], places[i + 1])
        parts.append(
            replace(
                whole,
                n_sequences=n,
                pool=whole.pool[held].clone(),
                page_table=PageTable(
                    table.offsets[own] - places[i],
                    table.tiers[own].clone(),
                    table.live_tokens[own].clone(),
                    table.starts[rows[i] : rows[i + 1] + 1] - entries[i],
                ),
                positions=None if whole.positions is None else whole.positions[own].clone(),
            )
        )
    return parts


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


def _check_tokens(index: int, tokens: SequenceTokens, of_token: tuple[int, ...]) -> None:
    """of_token: (n_kv_heads, head_dim), those of the first sequence."""
    if tokens.keys.ndim != 3:
        raise PageError(
            f"sequence {index}: keys is {tuple(tokens.keys.shape)}, expected (n_tokens, "
            "n_kv_heads, head_dim)"
        )
    n_tokens = tokens.keys.shape[0]
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "keys": (tokens.keys, (n_tokens, *of_token)),
        "values": (tokens.values, (n_tokens, *of_token)),
        "tier_of_token": (tokens.tier_of_token, (n_tokens, of_token[0])),
        "page_of_token": (tokens.page_of_token, (n_tokens, of_token[0])),
    }
    if tokens.positions is not None:
        expected["positions"] = (tokens.positions, (n_tokens,))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise PageError(f"sequence {index}: {name} is {tuple(tensor.shape)}, expected {shape}")
        if name not in ("keys", "values") and tensor.dtype not in INTEGER_DTYPES:
            raise PageError(f"sequence {index}: {name} is {tensor.dtype}, expected integers")


def pack_pages(
    tiers: Sequence[TierFormat],
    page_size: int,
    sequences: Sequence[SequenceTokens],
    slots: PageSlots,
    dead_rows: Literal["zero", "poison"],
    *,
    uses_kernel: bool = True,
) -> tuple[Tensor, Tensor]:
    """``(pool uint8, offsets (n_entries) int64)``; uses_kernel: as `encode`."""
    head_dim = sequences[0].keys.shape[2]
    device = sequences[0].keys.device
    sizes = torch.tensor(
        [page_bytes(tier, head_dim, page_size) for tier in tiers], dtype=torch.int64, device=device
    )
    entry_bytes = sizes[slots.entry_tiers]
    offsets = torch.cumsum(entry_bytes, 0) - entry_bytes
    pool = torch.zeros(int(entry_bytes.sum()), dtype=torch.uint8, device=device)
    keys = torch.cat([s.keys for s in sequences])
    values = torch.cat([s.values for s in sequences])
    n_tokens = torch.tensor([s.keys.shape[0] for s in sequences], device=device)
    token_row = (torch.cumsum(n_tokens, 0) - n_tokens)[slots.sequence] + slots.token
    is_full = slots.live_tokens == page_size
    for index, tier in enumerate(tiers):
        for full in (True, False):
            is_chosen = (slots.entry_tiers == index) & (is_full == full)
            n_pages = int(is_chosen.sum())
            if not n_pages:
                continue
            # Tokens are ordered by entry, then by row.
            chosen = is_chosen[slots.entry]
            where = (token_row[chosen], slots.kv_head[chosen])
            if full:
                rows = (x[where].view(-1, page_size, head_dim) for x in (keys, values))
                pages = encode(tier, *rows, uses_kernel=uses_kernel)
            else:
                page_of_entry = torch.cumsum(is_chosen, 0) - 1
                places = page_of_entry[slots.entry[chosen]] * page_size + slots.row[chosen]
                regions: list[tuple[RegionFormat, Operand, Tensor]] = [
                    (tier.key_format, "key", keys[where]),
                    (tier.value_format, "value", values[where]),
                ]
                packed = [_pack(*one, places, n_pages, page_size, dead_rows) for one in regions]
                pages = torch.cat(packed, dim=1)
            place_pages(pool, offsets[is_chosen], pages)
    return pool, offsets


def _pack(
    region_format: RegionFormat,
    operand: Operand,
    x: Tensor,
    places: Tensor,
    n_pages: int,
    page_size: int,
    dead_rows: Literal["zero", "poison"],
) -> Tensor:
    n_slots = n_pages * page_size
    stored = placed_rows(encode_vectors(region_format, x), places, n_slots)
    if dead_rows == "poison":
        dead = torch.ones(n_slots, dtype=torch.bool, device=x.device)
        dead[places] = False
        bits = radius_bits(region_format) if isinstance(region_format, SphericalCode) else 0
        stored = poisoned_rows(stored, dead, bits)
    stored = reshape_rows(stored, n_pages, page_size)
    return pack_region(region_format, operand, stored)
