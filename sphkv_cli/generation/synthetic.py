"""A cache as if a long prompt had been read: encoded pages of random vectors, for timing alone.

Prefilling 32 prompts of 100,000 tokens to time a decode step would take an hour; a step's time does
not depend on what the pages hold.  Source: ours.
"""

from dataclasses import replace

import torch

from sphkv_cli.errors import UsageError
from sphkv_cli.generation.placement import UniformRule
from sphkv_cli.generation.spherical_cache import SphericalCache
from sphkv_cli.generation.store_state import NewTokens
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.synthetic import tiled_cache


def fill_at_random(
    cache: SphericalCache, n_sequences: int, n_tokens: int, dtype: torch.dtype, seed: int = 42
) -> None:
    """Fill an empty uniform cache with n_tokens per sequence.

    Raises:
        UsageError: the cache is not uniform, or has first tokens or positions of its own.
    """
    rule, shape = cache.rule, cache.geometry
    if not isinstance(rule, UniformRule) or rule.first_tokens:
        raise UsageError("only a uniform cache is filled at random", "pass first_tokens=0")
    if any(store.stores_positions for store in cache.stores):
        raise UsageError("pages with positions are not filled at random", "drop windows and RoPE")
    n_sealed = rule.n_sealed(n_tokens)
    heads = (n_sequences, shape.n_kv_heads)
    tiers = torch.zeros((*heads, n_sealed // rule.page_size), dtype=torch.int64)
    tail = (*heads, n_tokens - n_sealed, shape.head_dim)
    pages: PagedCache | None = None
    for layer, store in enumerate(cache.stores):
        device = cache.device_of(layer)
        if pages is not None:
            # Bytes of its own in every layer; what they say does not matter.
            pages = replace(pages.to(device), pool=pages.pool.to(device, copy=True))
        elif n_sealed:
            pages = tiled_cache(
                rule.tiers,
                tiers,
                rule.page_size,
                shape.n_kv_heads,
                shape.head_dim,
                seed=seed,
                device=device,
            )
        keys, values = (torch.randn(tail, device=device).to(dtype) for _ in range(2))
        cache.adopt(layer, store.filled(pages, keys, values, _columns(tail[2], heads[0]), n_sealed))
    cache.n_columns = n_tokens


def _columns(n: int, n_sequences: int) -> NewTokens:
    return NewTokens(n, (tuple(range(n)),) * n_sequences, (0,) * n_sequences)
