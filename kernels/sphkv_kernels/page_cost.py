"""How long a page keeps a block busy, in bytes at the read rate: what the planner cuts into shares.

    cost = max(MEMORY_FACTOR bytes, BYTES_PER_INSTRUCTION loop instructions)     a spherical tier
    cost = ROW_FACTOR bytes                                                      int8 and dense

A code of few bits is bound by its instructions, not by its bytes: measured on one H100, a tile of
32 tokens takes 0.22 ns times the instructions of its loop (`decode_cost`) in a block of 12 warps
(0.216 for 4/3/3/3 r3 and 3/1/1/1, 0.222 for 3/2/2/2, 0.24 for 4/2/2/2 r2), while a block reads
23.4 kB/us. Equal bytes left the slowest block of a cache of four tiers 25 % behind the mean.
Source: ours.
"""

from __future__ import annotations

from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.block_words import native_layout_of
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.decode_cost import LOOP_INSTRUCTIONS, LOOP_TOKENS
from sphkv_kernels.tier import RegionFormat

BYTES_PER_INSTRUCTION = 5.2
MEMORY_FACTOR = 1.09
"""4/2/2/2 fp16, bound by memory, reaches 92 % of the read rate."""
ROW_FACTOR = 1.25
"""int8 reaches 80 %."""
COMPACT_LOOP: dict[int, int] = {64: 686, 128: 879, 256: 1555}
"""Instructions of 4/2/2/2 r2 where other codes' tables leave no room for its wide ones."""


def page_costs(cache: PagedCache) -> tuple[int, ...]:
    """Cost of one page of every tier of the cache, in bytes at the read rate."""
    shares_tables = sum(tier.kind == "spherical" for tier in cache.tiers) > 1
    costs = []
    for tier, n_bytes in zip(cache.tiers, cache.tier_page_bytes(), strict=True):
        loops = [_loop(region, shares_tables) for region in (tier.key_format, tier.value_format)]
        if None in loops:
            costs.append(ROW_FACTOR * n_bytes)
        else:
            instructions = sum(loop or 0 for loop in loops) / 2 * cache.page_size / LOOP_TOKENS
            costs.append(max(MEMORY_FACTOR * n_bytes, BYTES_PER_INSTRUCTION * instructions))
    return tuple(round(cost) for cost in costs)


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
