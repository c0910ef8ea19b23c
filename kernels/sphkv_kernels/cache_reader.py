"""Every token of a cache read back from its page bytes, in float64.

For measuring what a cache holds, not for attention: `reference` never rebuilds a spherical key.
Source: ours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_kernels.cache import PagedCache
from sphkv_kernels.layout import Operand
from sphkv_kernels.page_logits import tier_pages
from sphkv_kernels.tier import PageError


@dataclass(frozen=True)
class DecodedTokens:
    """keys, values: ``(n_tokens, n_kv_heads, head_dim) float64`` in the frame, zero where dropped;
    kept: ``(n_tokens, n_kv_heads) bool``."""

    keys: Tensor
    values: Tensor
    kept: Tensor


def read_tokens(cache: PagedCache, sequence: int, n_tokens: int) -> DecodedTokens:
    """Decode one sequence of a cache that was built with positions 0..n_tokens-1.

    Raises:
        PageError: the cache has no positions, or one lies outside.
    """
    if cache.positions is None:
        raise PageError("reading tokens back needs a cache built with positions")
    one = cache.select_sequences([sequence])
    assert one.positions is not None
    shape = (n_tokens, one.n_kv_heads, one.head_dim)
    keys = torch.zeros(shape, dtype=torch.float64, device=one.device)
    values = torch.zeros_like(keys)
    kept = torch.zeros(shape[:2], dtype=torch.bool, device=one.device)
    heads = one.page_table.head_of_entry()
    rows = torch.arange(one.page_size, device=one.device)
    regions: tuple[tuple[Operand, Tensor], ...] = (("key", keys), ("value", values))
    for operand, out in regions:
        for pages in tier_pages(one, operand):
            decoded = pages.decode()[pages.page_of_entry]
            live = rows < one.page_table.live_tokens[pages.entries][:, None]
            positions = one.positions[pages.entries].to(torch.int64)[live]
            _check_inside(positions, n_tokens)
            head = heads[pages.entries][:, None].expand_as(live)[live]
            out[positions, head] = decoded[live]
            kept[positions, head] = True
    return DecodedTokens(keys, values, kept)


def logits_by_token(pages: Tensor, cache: PagedCache, n_tokens: int) -> Tensor:
    """Page-table logits ``(n_entries, group_size, page_size)`` in token order.

    Returns ``(n_sequences, n_kv_heads, group_size, n_tokens)``, NaN where a token lies on no page.

    Raises:
        PageError: the cache has no positions, or one lies outside.
    """
    if cache.positions is None:
        raise PageError("logits in token order need a cache built with positions")
    group_size = pages.shape[1]
    n_heads = cache.n_sequences * cache.n_kv_heads
    shape = (n_heads, n_tokens, group_size)
    out = torch.full(shape, torch.nan, dtype=pages.dtype, device=pages.device)
    rows = torch.arange(cache.page_size, device=pages.device)
    live = rows < cache.page_table.live_tokens[:, None]
    head = cache.page_table.head_of_entry()[:, None].expand_as(live)[live]
    positions = cache.positions.to(torch.int64)[live]
    _check_inside(positions, n_tokens)
    out[head, positions] = pages.transpose(1, 2)[live]
    out = out.transpose(1, 2)
    return out.reshape(cache.n_sequences, cache.n_kv_heads, group_size, n_tokens)


def _check_inside(positions: Tensor, n_tokens: int) -> None:
    if positions.numel() and not (int(positions.min()) >= 0 and int(positions.max()) < n_tokens):
        raise PageError(f"a position of the cache lies outside 0..{n_tokens - 1}")
