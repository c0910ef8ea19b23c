"""How long a page keeps a block busy, in bytes at the read rate: what the planner cuts into shares.

    cost = BYTES_PER_INSTRUCTION loop instructions     a spherical tier
    cost = ROW_FACTOR bytes                            int8 and dense
    cost >= MEMORY_FACTOR bytes                        where memory binds all pages together

A block reads 23.4 kB/us where memory binds. A code of few bits is bound by its instructions, not by
its bytes, and beside such pages one of many bytes has memory enough and is bound by its
instructions too. Measured by clock stamps of every block on one H100, fifteen plans of five mixed
caches of 3/2/2/2 r2, 4/2/2/2 r2, 4/2/2/2 fp16 and int8: a page of 32 tokens takes 0.137, 0.173,
0.155 and 0.346 us (standard deviation of a block's time around these: 1 to 3 % of it).
Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.block_words import native_layout_of
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.decode_cost import LOOP_INSTRUCTIONS, LOOP_TOKENS
from sphkv_kernels.tier import RegionFormat

BYTES_PER_INSTRUCTION = 4.75
MEMORY_FACTOR = 1.09
"""4/2/2/2 fp16 alone, bound by memory, reaches 92 % of the read rate."""
ROW_FACTOR = 0.975
COMPACT_LOOP: dict[int, int] = {64: 686, 128: 879, 256: 1555}
"""Instructions of 4/2/2/2 r2 where other codes' tables leave no room for its wide ones."""


def page_costs(cache: PagedCache, n_pages: Sequence[int]) -> tuple[tuple[int, ...], bool]:
    """Cost of one page of every tier of the cache, which holds n_pages of each, and whether memory
    binds."""
    n_codes = sum(
        t.kind == "spherical" and n > 0 for t, n in zip(cache.tiers, n_pages, strict=True)
    )
    sizes, costs = cache.tier_page_bytes(), []
    for tier, n_bytes in zip(cache.tiers, sizes, strict=True):
        loops = [_loop(region, n_codes > 1) for region in (tier.key_format, tier.value_format)]
        if None in loops:
            costs.append(ROW_FACTOR * n_bytes)
        else:
            instructions = sum(loop or 0 for loop in loops) / 2 * cache.page_size / LOOP_TOKENS
            costs.append(BYTES_PER_INSTRUCTION * instructions)
    memory_binds = bool(np.dot(n_pages, sizes) > np.dot(n_pages, costs))
    if memory_binds:
        costs = [max(c, MEMORY_FACTOR * n_bytes) for c, n_bytes in zip(costs, sizes, strict=True)]
    return tuple(round(cost) for cost in costs), memory_binds


def _loop(region: RegionFormat, shares_tables: bool) -> int | None:
    """Instructions for 32 tokens of keys and values; None for rows and codes without a layout."""
    if not isinstance(region, SphericalCode):
        return None
    layout = native_layout_of(region)
    if layout is None:
        return None
    loops = LOOP_INSTRUCTIONS[layout.scheme]
    if shares_tables and layout.scheme == "pair_swap":
        loops = COMPACT_LOOP
    return loops.get(region.head_dim)
