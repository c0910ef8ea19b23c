"""What decoding a code costs the CUDA kernel, in instructions: an estimate without a GPU.

    instructions per coordinate = 32 lanes * loop / (32 tokens * 2 operands * head_dim)

`loop` counts the SASS instructions of one warp's innermost loop (32 tokens of K and V: decoding,
both matrix products, softmax; rare branches included) of the kernel built for sm_90 with one tier
of the code, groups of up to 8 query heads, 12 warps or, at head_dim 256, 8. Counted in
disassemblies; today's kernel has up to 3 % fewer at head_dim 64 and 128, and a test holds all to
within 10 %. Codes without a native layout are read by the reference alone and have no such number.
Fewer instructions are faster only where memory does not bind: see NOTES.md. Ours.
"""

from __future__ import annotations

import numpy as np

from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.block_words import decoded_layout_of
from sphkv_kernels.layout import Scheme

LOOP_TOKENS = 32

LOOP_INSTRUCTIONS: dict[Scheme, dict[int, int]] = {
    "pair_half": {64: 595, 128: 738, 256: 1257},
    "pair_swap": {64: 618, 128: 749, 256: 1225},
    "pair_nine": {64: 693, 128: 886, 256: 1512},
    "pair_nine_float": {64: 651, 128: 850, 256: 1478},
    "single": {64: 696, 128: 885, 256: 1513},
    "quad": {64: 585, 128: 683, 256: 1095},
    "quad_spread": {64: 591, 128: 701, 256: 1139},
}
"""By scheme and head_dim, NVRTC 13 for sm_90."""

POSITION_TERM_SHARES: dict[int, float] = {0: 0.0, 4: 0.12, 8: 0.21, 16: 0.54, 32: 0.99}
"""By RoPE pairs: what the position term adds to the time of a step, at most. Measured on an H100 of
an earlier kernel: 3/2/2/2 with two-bit radii (the fastest code), head_dim 128, 8 x 8 x 32768 x 4.
Today's adds 0.11, 0.19, 0.46 and 0.63 at most, over all codes, shapes and orders of positions of
its report; an H200, where steps are shorter, 0.13, 0.23, 0.51 and 0.70."""


def instructions_per_coordinate(key_code: SphericalCode, value_code: SphericalCode) -> float | None:
    """Of a tier; None where the kernel does not read one of its codes.

    A tier of two codes decodes half of each code's loop.
    """
    loops = []
    for code in (key_code, value_code):
        layout = decoded_layout_of(code)
        if layout is None:
            return None
        loops.append(LOOP_INSTRUCTIONS[layout.scheme][code.head_dim])
    return 32.0 * sum(loops) / 2.0 / (LOOP_TOKENS * 2 * key_code.head_dim)


def position_term_cost(n_pairs: int) -> float:
    """What a position term of n_pairs RoPE pairs adds to a decode step, as a share of its time.

    A model of the kernel's measured times, not of its instructions: interpolated between
    `POSITION_TERM_SHARES`, 0 without pairs, and past the last point along its last slope. Where
    the code is slower than the one measured, it costs relatively less.
    Raises ValueError for fewer than 0 pairs.
    """
    if n_pairs < 0:
        raise ValueError(f"a position term of {n_pairs} RoPE pairs: 0 or more")
    padded = 4 * 2 ** max(0, (-(-n_pairs // 4) - 1).bit_length()) if n_pairs else 0
    pairs, shares = zip(*sorted(POSITION_TERM_SHARES.items()), strict=True)
    if padded > pairs[-1]:
        slope = (shares[-1] - shares[-2]) / (pairs[-1] - pairs[-2])
        return float(shares[-1] + slope * (padded - pairs[-1]))
    return float(np.interp(padded, pairs, shares))
