"""Regions of native codes: block words in lane-ordered planes, as the kernel loads them.

A unit is 16 tokens: its planes one after the other, then the norms.  The word of (token, block) in
a plane of `width` bytes lies at ``unit_offsets(operand, head_dim, width)[token, block]``; its bits
are the fields of `NativeLayout`.  LAYOUT.md is the specification; `layout` holds the tables.
Source: ours.
"""

import functools

import torch
from torch import Tensor

from sphkv_codebooks.encoded import EncodedVectors
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.bit_fields import float16_bits, float16_from_bits
from sphkv_kernels.code_fields import (
    encoded_of,
    fields_of,
    level_bits,
    native_radius_name,
    radius_bits,
)
from sphkv_kernels.layout import (
    NORM_BYTES,
    UNIT_TOKENS,
    NativeLayout,
    Operand,
    find_native_layout,
    norm_offsets,
    unit_bytes,
    unit_offsets,
)

NATIVE_HEAD_DIMS = (64, 128, 256)


def native_layout_of(code: SphericalCode) -> NativeLayout | None:
    """The kernel's layout of a code, or None: then the code is stored as a bit stream."""
    bits = level_bits(code)
    if code.head_dim not in NATIVE_HEAD_DIMS or code.depth != 4:
        return None
    if any(1 << b != n for b, n in zip(bits, code.n_cells, strict=True)):
        return None  # the kernel's tables have 2^bits rows
    radius = native_radius_name(code)
    return None if radius is None else find_native_layout(bits, radius, radius_bits(code))


def decoded_layout_of(code: SphericalCode) -> NativeLayout | None:
    """The layout by which the CUDA kernels decode and encode a code, None where they cannot: a
    page may hold a native layout of RoPE pairs, which the reference alone reads."""
    return native_layout_of(code) if code.pairing == "adjacent" else None


def pack_units(
    code: SphericalCode, layout: NativeLayout, operand: Operand, encoded: EncodedVectors
) -> Tensor:
    """``(n_pages, page_size / 16 * unit_bytes) uint8`` from vectors ``(n_pages, page_size)``."""
    angles, radii, norms = fields_of(code, encoded)
    n_pages, page_size = radii.shape[:2]
    n_units = n_pages * page_size // UNIT_TOKENS
    n_blocks = code.head_dim // UNIT_TOKENS
    # codes[level][..., index]: angles of level l of a block are contiguous; level 0 is the radius.
    codes = [
        codes.to(torch.int64).reshape(n_units, UNIT_TOKENS, n_blocks, -1)
        for codes in (radii, *angles)
    ]
    device = radii.device
    units = torch.zeros(
        (n_units, unit_bytes(layout, code.head_dim)), dtype=torch.uint8, device=device
    )
    first = 0
    for plane, plane_bits in enumerate(layout.plane_bits):
        words = torch.zeros((n_units, UNIT_TOKENS, n_blocks), dtype=torch.int64, device=device)
        for field in layout.fields:
            if field.plane == plane:
                value = codes[field.level][..., field.index] >> field.source_shift
                value = value & ((1 << field.width) - 1)
                if field.mirrored:
                    value = (1 << field.width) - 1 - value
                words |= value << field.shift
        width = plane_bits // 8
        where = first + _offsets(operand, code.head_dim, width).to(device)
        for byte in range(width):
            units[:, where + byte] = ((words >> (8 * byte)) & 0xFF).to(torch.uint8)
        first += UNIT_TOKENS * n_blocks * width
    if layout.has_norm:
        units[:, first : first + NORM_BYTES] = pack_norms(norms.reshape(n_units, UNIT_TOKENS))
    return units.reshape(n_pages, -1)


def unpack_units(
    code: SphericalCode, layout: NativeLayout, operand: Operand, regions: Tensor, page_size: int
) -> EncodedVectors:
    """The inverse of `pack_units`: vectors ``(n_pages, page_size)``."""
    n_pages, device = regions.shape[0], regions.device
    n_blocks = code.head_dim // UNIT_TOKENS
    units = regions.reshape(-1, unit_bytes(layout, code.head_dim))
    n_units = units.shape[0]
    shape = (n_units, UNIT_TOKENS, n_blocks)
    counts = [1, *(8 >> level for level in range(code.depth))]
    codes = [torch.zeros((*shape, n), dtype=torch.int64, device=device) for n in counts]
    first = 0
    for plane, plane_bits in enumerate(layout.plane_bits):
        width = plane_bits // 8
        where = first + _offsets(operand, code.head_dim, width).to(device)
        words = torch.zeros(shape, dtype=torch.int64, device=device)
        for byte in range(width):
            words |= units[:, where + byte].to(torch.int64) << (8 * byte)
        for field in layout.fields:
            if field.plane == plane and not field.mirrored:
                value = (words >> field.shift) & ((1 << field.width) - 1)
                codes[field.level][..., field.index] |= value << field.source_shift
        first += UNIT_TOKENS * n_blocks * width
    if layout.has_norm:
        norms = unpack_norms(units[:, first : first + NORM_BYTES])
    else:
        norms = torch.zeros((n_units, UNIT_TOKENS), dtype=torch.int64, device=device)
    radii, *angles = (c.reshape(n_pages, page_size, -1) for c in codes)
    return encoded_of(code, angles, radii, norms.reshape(n_pages, page_size))


def pack_norms(bits: Tensor) -> Tensor:
    """fp16 bit patterns of 16 tokens ``(n_units, 16)`` as 32 bytes in the kernel's order."""
    halves = torch.zeros_like(bits)
    halves[:, _norm_halves(bits.device)] = bits
    return float16_from_bits(halves).view(torch.uint8)


def unpack_norms(raw: Tensor) -> Tensor:
    """The inverse of `pack_norms`: ``(n_units, 16) int64`` bit patterns."""
    halves = float16_bits(raw.contiguous().view(torch.float16))
    return halves[:, _norm_halves(raw.device)]


def _norm_halves(device: torch.device) -> Tensor:
    return torch.from_numpy(norm_offsets() // 2).to(device)


@functools.lru_cache(maxsize=64)
def _offsets(operand: Operand, head_dim: int, width: int) -> Tensor:
    """``(16, n_blocks) int64`` on the CPU."""
    return torch.from_numpy(unit_offsets(operand, head_dim, width))
