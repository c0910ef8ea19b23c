"""Where tokens with a tier and a page number each lie: entries of the page table and rows.

Inside one (sequence, KV head) the tokens that carry one page number share a page.  Entries of a
head are ordered by tier, then by page number.  Source: ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_kernels.page_table import PageTable
from sphkv_kernels.tier import DROPPED, PageError


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
