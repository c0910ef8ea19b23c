"""Bytes of a native page region: which bit of which word holds which field (LAYOUT.md; ours).

offset(word) = (b / chunk) * 32 * chunk + lane * chunk + b % chunk,  b = slot * width_bytes

A `NativeLayout` lists the word planes of a block of 16 coordinates and the place of every field in
them; `unit_offsets` says at which byte of a plane the word of (token, block) lies, so that the lane
of an mma.m16n8k16 fragment that owns the block reads it with its own 16-byte load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

UNIT_TOKENS = 16
BLOCK_COORDINATES = 16
NORM_BYTES = 2 * UNIT_TOKENS
Operand = Literal["key", "value"]
Scheme = Literal[
    "pair_half", "pair_swap", "pair_nine", "pair_nine_float", "single", "quad", "quad_spread"
]


@dataclass(frozen=True)
class Field:
    """Bits [source_shift, source_shift + width) of one code, at bit `shift` of word `plane`.

    level: 1..4 for angles, 0 for the radius; index: which angle of that level inside the block.
    mirrored: the word holds `2^width - 1 - code` (a redundant copy, ignored when reading).
    """

    level: int
    index: int
    plane: int
    shift: int
    width: int
    source_shift: int = 0
    mirrored: bool = False


@dataclass(frozen=True)
class NativeLayout:
    """Word planes of one native code.

    scheme: the kernel's decode routine; plane_bits: word width of each plane;
    radius: "fp16" (the radius is an fp16 field), "minifloat" (its top 11 bits) or "lloyd_max"
    (a code against one fp16 norm per vector).
    """

    scheme: Scheme
    level_bits: tuple[int, int, int, int]
    radius: Literal["fp16", "minifloat", "lloyd_max"]
    radius_bits: int
    plane_bits: tuple[int, ...]
    fields: tuple[Field, ...]

    @property
    def has_norm(self) -> bool:
        return self.radius == "lloyd_max"

    @property
    def bits_per_block(self) -> int:
        return sum(self.plane_bits)


def _run(plane: int, shift: int, *parts: tuple[int, int, int]) -> list[Field]:
    """Fields (level, index, width) one after the other from bit `shift` of `plane`."""
    fields = []
    for level, index, width in parts:
        fields.append(Field(level, index, plane, shift, width))
        shift += width
    return fields


def _level1(bits: int) -> list[Field]:
    return _run(0, 0, *((1, index, bits) for index in range(8)))


def _native_layouts() -> tuple[NativeLayout, ...]:
    pair_half = [
        *_level1(4),
        *_run(1, 0, (2, 0, 2), (2, 1, 2), (3, 0, 2), (4, 0, 2)),
        *_run(1, 8, (2, 2, 2), (2, 3, 2), (3, 1, 2)),
        Field(4, 0, 1, 14, 2, mirrored=True),
        Field(0, 0, 1, 16, 16),
    ]
    pair_swap = [
        *_level1(4),
        *_run(1, 0, (2, 0, 2), (2, 1, 2), (3, 0, 2), (4, 0, 2)),
        *_run(1, 8, (2, 2, 2), (2, 3, 2), (3, 1, 2), (0, 0, 2)),
    ]
    pair_nine = [
        *_level1(4),
        *_run(1, 0, (2, 0, 3), (2, 1, 3), (3, 0, 3), (2, 2, 3), (2, 3, 3)),
        Field(3, 1, 1, 15, 1),
        Field(3, 1, 2, 0, 2, source_shift=1),
        *_run(2, 2, (4, 0, 3), (0, 0, 3)),
    ]
    pair_nine_float = [
        *_level1(4),
        Field(0, 0, 1, 0, 5, source_shift=6),
        *_run(1, 5, (4, 0, 3), (2, 0, 3), (2, 1, 3), (3, 0, 3), (2, 2, 3), (2, 3, 3), (3, 1, 3)),
        Field(0, 0, 1, 26, 6),
    ]
    upper = [(2, 0), (2, 1), (2, 2), (2, 3), (3, 0), (3, 1), (4, 0), (0, 0)]
    single = [
        field
        for index, (level, item) in enumerate(upper)
        for field in _run(index // 4, 8 * (index % 4), (1, index, 5), (level, item, 3))
    ]
    quad = [
        *(
            field
            for index in range(4)
            for field in _run(0, 8 * index, (1, 2 * index, 3), (1, 2 * index + 1, 3), (2, index, 2))
        ),
        *_run(1, 0, (3, 0, 2), (3, 1, 2), (4, 0, 2), (0, 0, 2)),
    ]
    spread = [(3, 0), (3, 1), (4, 0), (0, 0)]
    quad_spread = [
        field
        for index, (level, item) in enumerate(spread)
        for field in _run(
            0,
            8 * index,
            (1, 2 * index, 3),
            (1, 2 * index + 1, 3),
            (2, index, 1),
            (level, item, 1),
        )
    ]
    return (
        NativeLayout("pair_half", (4, 2, 2, 2), "fp16", 16, (32, 32), tuple(pair_half)),
        NativeLayout("pair_swap", (4, 2, 2, 2), "lloyd_max", 2, (32, 16), tuple(pair_swap)),
        NativeLayout("pair_nine", (4, 3, 3, 3), "lloyd_max", 3, (32, 16, 8), tuple(pair_nine)),
        NativeLayout(
            "pair_nine_float", (4, 3, 3, 3), "minifloat", 11, (32, 32), tuple(pair_nine_float)
        ),
        NativeLayout("single", (5, 3, 3, 3), "lloyd_max", 3, (32, 32), tuple(single)),
        NativeLayout("quad", (3, 2, 2, 2), "lloyd_max", 2, (32, 8), tuple(quad)),
        NativeLayout("quad_spread", (3, 1, 1, 1), "lloyd_max", 1, (32,), tuple(quad_spread)),
    )


NATIVE_LAYOUTS: tuple[NativeLayout, ...] = _native_layouts()


def find_native_layout(
    level_bits: tuple[int, ...], radius: str, radius_bits: int
) -> NativeLayout | None:
    """The native layout of a depth-4 code, or None where the kernel has none for it."""
    for layout in NATIVE_LAYOUTS:
        if (layout.level_bits, layout.radius, layout.radius_bits) == (
            level_bits,
            radius,
            radius_bits,
        ):
            return layout
    return None


def unit_bytes(layout: NativeLayout, head_dim: int) -> int:
    """Bytes of one unit (16 tokens of one KV head, K or V)."""
    n_blocks = head_dim // BLOCK_COORDINATES
    words = UNIT_TOKENS * n_blocks * layout.bits_per_block // 8
    return words + (NORM_BYTES if layout.has_norm else 0)


def lane_slot(operand: Operand, head_dim: int) -> npt.NDArray[np.int64]:
    """(16, n_blocks, 2): the lane that owns (token, block) and the slot among its words."""
    n_blocks = head_dim // BLOCK_COORDINATES
    owner = np.full((UNIT_TOKENS, n_blocks, 2), -1, dtype=np.int64)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for slot in range(n_blocks // 2):
            if operand == "key":
                token, block = g + 8 * (slot % 2), 4 * (slot // 2) + t
            elif head_dim == 64:
                token, block = 8 * (g // 4) + 2 * t + slot % 2, g % 4
            else:
                columns = n_blocks // 8
                group, rest = divmod(slot, 2 * columns)
                token, block = 8 * group + 2 * t + rest % 2, g + 8 * (rest // 2)
            owner[token, block] = lane, slot
    return owner


def unit_offsets(operand: Operand, head_dim: int, width_bytes: int) -> npt.NDArray[np.int64]:
    """(16, n_blocks): byte offset, inside a plane of words of `width_bytes`, of (token, block)."""
    n_blocks = head_dim // BLOCK_COORDINATES
    owner = lane_slot(operand, head_dim)
    lane, byte = owner[..., 0], owner[..., 1] * width_bytes
    chunk = min(16, n_blocks // 2 * width_bytes)
    return byte // chunk * (32 * chunk) + lane * chunk + byte % chunk


def norm_offsets() -> npt.NDArray[np.int64]:
    """(16,): byte offset of each token's fp16 norm (or int8 scale) inside its array of 32 bytes."""
    token = np.arange(UNIT_TOKENS)
    return 2 * (2 * (token % 8) + token // 8)
