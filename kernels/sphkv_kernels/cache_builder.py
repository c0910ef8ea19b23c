"""From tokens with a tier and a page each to a `PagedCache`.

Inside one (sequence, KV head) the tokens that carry one page number share a page; all tiers are
encoded in one call per tier.  Entries of a head are ordered by tier, then by page number; pages
lie in the pool in the order of the entries.  Source: ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.code_fields import radius_bits
from sphkv_kernels.layout import Operand
from sphkv_kernels.page_table import PageTable
from sphkv_kernels.pages import pack_region, page_bytes
from sphkv_kernels.tier import DROPPED, PageError, RegionFormat, TierFormat
from sphkv_kernels.vectors import encode_vectors, placed_rows, poisoned_rows, reshape_rows


@dataclass(frozen=True)
class SequenceTokens:
    """The tokens of one sequence in the frame, and where each goes.

    keys, values: ``(n_tokens, n_kv_heads, head_dim)`` floating.  tier_of_token: ``(n_tokens,
    n_kv_heads)`` integer, -1 = dropped.  page_of_token: ``(n_tokens, n_kv_heads)`` integer, a page
    number unique inside the KV head (ignored for dropped tokens).  positions: ``(n_tokens)``
    integer, or None.
    """

    keys: Tensor
    values: Tensor
    tier_of_token: Tensor
    page_of_token: Tensor
    positions: Tensor | None = None


@dataclass(frozen=True)
class PageSlots:
    """Where every kept token lies: parallel arrays over tokens and over page-table entries."""

    sequence: Tensor  # (n_kept) int64
    token: Tensor
    kv_head: Tensor
    entry: Tensor
    row: Tensor
    entry_tiers: Tensor  # (n_entries) int64
    entry_heads: Tensor  # sequence * n_kv_heads + kv_head
    live_tokens: Tensor


def place_tokens(sequences: Sequence[SequenceTokens], n_tiers: int, page_size: int) -> PageSlots:
    """Entry and row of every kept token.  Raises PageError on a mixed or overfull page."""
    columns: list[Tensor] = []
    for index, tokens in enumerate(sequences):
        kept = torch.nonzero(tokens.tier_of_token != DROPPED)
        tier = tokens.tier_of_token[kept[:, 0], kept[:, 1]].to(torch.int64)
        page = tokens.page_of_token[kept[:, 0], kept[:, 1]].to(torch.int64)
        if tier.numel() and not (int(tier.min()) >= 0 and int(tier.max()) < n_tiers):
            raise PageError(f"sequence {index}: a tier index lies outside 0..{n_tiers - 1}")
        if page.numel() and int(page.min()) < 0:
            raise PageError(f"sequence {index}: a kept token has page {int(page.min())}")
        head = index * tokens.keys.shape[1] + kept[:, 1]
        columns.append(torch.stack([head, tier, page, kept[:, 0]]))
    n_kv_heads = sequences[0].keys.shape[1]
    head, tier, page, token = torch.cat(columns, dim=1)
    # Sort by (head, tier, page, token): the last key varies fastest, so sort it first.
    order = torch.argsort(token, stable=True)
    for key in (page, tier, head):
        order = order[torch.argsort(key[order], stable=True)]
    head, tier, page, token = head[order], tier[order], page[order], token[order]
    starts_page = torch.ones(head.shape[0], dtype=torch.bool, device=head.device)
    starts_page[1:] = (head[1:] != head[:-1]) | (tier[1:] != tier[:-1]) | (page[1:] != page[:-1])
    first = torch.nonzero(starts_page).flatten()
    entry = torch.cumsum(starts_page, 0) - 1
    row = torch.arange(head.shape[0], device=head.device) - first[entry]
    live = torch.bincount(entry, minlength=first.shape[0])
    if live.numel() and int(live.max()) > page_size:
        worst = int(live.argmax())
        raise PageError(
            f"page {int(page[first[worst]])} of sequence {int(head[first[worst]]) // n_kv_heads}, "
            f"KV head {int(head[first[worst]]) % n_kv_heads} has {int(live[worst])} tokens; a page "
            f"holds {page_size}"
        )
    pair = torch.stack([head[first], page[first]], dim=1)
    if torch.unique(pair, dim=0).shape[0] != pair.shape[0]:
        raise PageError("a page holds tokens of two tiers; a page belongs to one tier")
    return PageSlots(
        sequence=head // n_kv_heads,
        token=token,
        kv_head=head % n_kv_heads,
        entry=entry,
        row=row,
        entry_tiers=tier[first],
        entry_heads=head[first],
        live_tokens=live,
    )


def pack_pages(
    tiers: Sequence[TierFormat],
    page_size: int,
    sequences: Sequence[SequenceTokens],
    slots: PageSlots,
    dead_rows: Literal["zero", "poison"],
) -> tuple[Tensor, Tensor]:
    """``(pool uint8, offsets (n_entries) int64)``."""
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
    for index, tier in enumerate(tiers):
        entries = torch.nonzero(slots.entry_tiers == index).flatten()
        if entries.numel() == 0:
            continue
        chosen = slots.entry_tiers[slots.entry] == index
        page_of_entry = torch.zeros_like(slots.entry_tiers)
        page_of_entry[entries] = torch.arange(entries.numel(), device=device)
        places = page_of_entry[slots.entry[chosen]] * page_size + slots.row[chosen]
        where = (token_row[chosen], slots.kv_head[chosen])
        operands: list[tuple[RegionFormat, Operand, Tensor]] = [
            (tier.key_format, "key", keys),
            (tier.value_format, "value", values),
        ]
        regions = [
            _pack(region_format, operand, x[where], places, entries.numel(), page_size, dead_rows)
            for region_format, operand, x in operands
        ]
        pages = torch.cat(regions, dim=1)
        columns = torch.arange(pages.shape[1], device=device)
        pool[offsets[entries][:, None] + columns] = pages
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


def table_of(slots: PageSlots, offsets: Tensor, n_heads: int) -> PageTable:
    """The page table over all (sequence, KV head) pairs."""
    counts = torch.bincount(slots.entry_heads, minlength=n_heads)
    starts = torch.zeros(n_heads + 1, dtype=torch.int64, device=offsets.device)
    starts[1:] = counts.cumsum(0)
    return PageTable(
        offsets=offsets,
        tiers=slots.entry_tiers.to(torch.int8),
        live_tokens=slots.live_tokens.to(torch.int16),
        starts=starts.to(torch.int32),
    )
