"""Caches of any size for timing: a few hundred really encoded pages, laid out again and again.

Every page of the result is a copy, at an address of its own, of one of `n_distinct` pages packed
from Gaussian vectors; so the bytes stream from memory like those of a long context while encoding
takes a second. Source: ours.
"""

from __future__ import annotations

import torch

from sphkv_kernels.cache import PagedCache
from sphkv_kernels.cache_builder import build_cache
from sphkv_kernels.page_slots import SequenceTokens
from sphkv_kernels.page_table import PageTable
from sphkv_kernels.tier import PageError, TierFormat


def tiled_cache(
    tiers: tuple[TierFormat, ...],
    page_tiers: torch.Tensor,
    page_size: int,
    n_kv_heads: int,
    head_dim: int,
    *,
    seed: int = 42,
    n_distinct: int = 256,
    device: torch.device | str = "cuda",
) -> PagedCache:
    """A cache of full pages with given tiers.

    page_tiers: (n_sequences, n_kv_heads, n_pages) integer tier of every page, -1 for none. Which of
    the distinct pages each becomes is drawn with `seed`.
    """
    n_sequences, n_heads, n_pages = page_tiers.shape
    if n_heads != n_kv_heads:
        raise PageError(f"page_tiers is for {n_heads} KV heads, not {n_kv_heads}")
    flat = page_tiers.reshape(-1).to(torch.int64)
    kept = torch.nonzero(flat >= 0).flatten()
    flat = flat[kept]
    generator = torch.Generator().manual_seed(seed)
    pieces = [
        _distinct_pages(tier, page_size, head_dim, n_distinct, generator, device) for tier in tiers
    ]
    sizes = torch.tensor([piece.shape[1] for piece in pieces], dtype=torch.int64)
    page_bytes = sizes[flat]
    offsets = torch.cumsum(page_bytes, 0) - page_bytes
    pool = torch.empty(int(page_bytes.sum()), dtype=torch.uint8, device=device)
    for index, piece in enumerate(pieces):
        where = torch.nonzero(flat == index).flatten()
        width = piece.shape[1] // 16
        chosen = torch.randint(n_distinct, (where.numel(),), generator=generator)
        lines = pool.view(torch.int64).view(-1, 2)
        source = piece.view(torch.int64).view(n_distinct, width, 2)
        for first in range(0, where.numel(), 65536):
            part = slice(first, first + 65536)
            rows = (offsets[where[part]] // 16)[:, None] + torch.arange(width)
            lines[rows.reshape(-1).to(device)] = source[chosen[part].to(device)].reshape(-1, 2)
    head = kept // n_pages
    counts = torch.bincount(head, minlength=n_sequences * n_kv_heads)
    starts = torch.zeros(n_sequences * n_kv_heads + 1, dtype=torch.int32)
    starts[1:] = counts.cumsum(0)
    table = PageTable(
        offsets=offsets,
        tiers=flat.to(torch.int8),
        live_tokens=torch.full((flat.numel(),), page_size, dtype=torch.int16),
        starts=starts,
    )
    return PagedCache(
        tiers=tiers,
        page_size=page_size,
        n_sequences=n_sequences,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        pool=pool,
        page_table=table.to(device),
    )


def _distinct_pages(
    tier: TierFormat,
    page_size: int,
    head_dim: int,
    n_pages: int,
    generator: torch.Generator,
    device: torch.device | str,
) -> torch.Tensor:
    """(n_pages, page_bytes) uint8: pages of Gaussian keys and values."""
    n_tokens = n_pages * page_size
    tokens = SequenceTokens(
        keys=torch.randn((n_tokens, 1, head_dim), generator=generator).to(device),
        values=torch.randn((n_tokens, 1, head_dim), generator=generator).to(device),
        tier_of_token=torch.zeros((n_tokens, 1), dtype=torch.int8, device=device),
        page_of_token=(torch.arange(n_tokens, device=device) // page_size)[:, None].to(torch.int32),
    )
    cache = build_cache((tier,), page_size, (tokens,))
    return cache.pool.view(n_pages, -1)
