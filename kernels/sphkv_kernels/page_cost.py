"""How long a page keeps a block busy, in bytes of an H100: what the planner cuts into shares.

    cost = BYTES_PER_INSTRUCTION loop instructions     a spherical tier
    cost = ROW_FACTOR bytes / speed                    int8 and dense
    cost >= MEMORY_FACTOR bytes / speed                where memory binds all pages together

`speed` is what memory delivers to a multiprocessor in a clock, relative to an H100; a unit of cost
is the clocks that an H100 needs for a byte. On an H100 a block reads 23.4 kB/us where memory binds.
A code of few bits is bound by its instructions, not by its bytes, and beside such pages one of many
bytes has memory enough and is bound by its instructions too. Measured by clock stamps of every
block on one H100, fifteen plans of five mixed caches of 3/2/2/2 r2, 4/2/2/2 r2, 4/2/2/2 fp16 and
int8: a page of 32 tokens takes 0.137, 0.173, 0.155 and 0.346 us (standard deviation of a block's
time around these: 1 to 3 % of it). At head_dim 64 and 256 from the times of each tier alone (4 x 8
x 131072 and 4 x 8 x 65536); at 64, where int8 alone spills registers and beside codes does not,
also from five ratios of the two factors in a mixed cache: 53.8 us at this one, 57.7 at that of 128.
On an H200 (speed 1.44) four tiers took 211, 195, 189 and 191 us with speeds of 1, 1.2, 1.44 and
1.6, a retention policy 75.0, 70.6, 66.6 and 67.1.
Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.block_words import native_layout_of
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.decode_cost import LOOP_INSTRUCTIONS, LOOP_TOKENS
from sphkv_kernels.tier import PageError, RegionFormat

BYTES_PER_INSTRUCTION = {64: 4.35, 128: 4.75, 256: 5.75}
"""By head_dim; 256 has fewer warps to hide latency."""
ROW_FACTOR = {64: 1.2, 128: 0.975, 256: 0.975}
"""By head_dim: the softmax is the same work for shorter rows."""
MEMORY_FACTOR = 1.09
"""4/2/2/2 fp16 and int8 alone, bound by memory, reach 92 and 93 % of the read rate."""
H100_SPEED = 2_619_000 * 5120 / 1_980_000 / 132
"""memory_speed of an H100 SXM: clocks in kHz, bus in bits."""
COMPACT_LOOP: dict[int, int] = {64: 686, 128: 879, 256: 1487}
"""Instructions of 4/2/2/2 r2 where other codes' tables leave no room for its wide ones."""


def memory_speed(device: torch.device) -> float:
    """Bytes of memory a clock and multiprocessor, relative to an H100 SXM; 1 without a GPU, or one
    that does not say."""
    if device.type != "cuda":
        return 1.0
    found = torch.cuda.get_device_properties(device)
    bits = found.memory_clock_rate * found.memory_bus_width
    clocks = found.clock_rate * found.multi_processor_count
    if bits <= 0 or clocks <= 0:
        return 1.0
    return bits / clocks / H100_SPEED


def page_costs(
    cache: PagedCache, n_pages: Sequence[int], speed: float = 1.0
) -> tuple[tuple[int, ...], bool]:
    """Cost of one page of every tier of the cache, which holds n_pages of each, and whether memory
    binds, with memory of `memory_speed` speed. Raises PageError for a head_dim that the kernel does
    not have."""
    if cache.head_dim not in ROW_FACTOR:
        raise PageError(f"head_dim {cache.head_dim}: the CUDA kernel has {tuple(ROW_FACTOR)}")
    codes = {
        code.digest
        for tier, n in zip(cache.tiers, n_pages, strict=True)
        for code in (tier.key_code, tier.value_code)
        if n > 0 and code is not None
    }
    sizes, costs = cache.tier_page_bytes(), []
    for tier, n_bytes in zip(cache.tiers, sizes, strict=True):
        loops = [_loop(region, len(codes) > 1) for region in (tier.key_format, tier.value_format)]
        if None in loops:
            costs.append(ROW_FACTOR[cache.head_dim] * n_bytes / speed)
        else:
            instructions = sum(loop or 0 for loop in loops) / 2 * cache.page_size / LOOP_TOKENS
            costs.append(BYTES_PER_INSTRUCTION[cache.head_dim] * instructions)
    memory_binds = bool(np.dot(n_pages, sizes) / speed > np.dot(n_pages, costs))
    if memory_binds:
        least = [MEMORY_FACTOR * n_bytes / speed for n_bytes in sizes]
        costs = [max(pair) for pair in zip(costs, least, strict=True)]
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
