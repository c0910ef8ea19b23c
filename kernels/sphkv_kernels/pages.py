"""Pages: ``page = [K region][V region]`` of one KV head, one tier, page_size tokens.

Each region is padded to 16 bytes.  What it holds depends on its format:

    spherical   block words in lane-ordered planes where the kernel has them (`block_words`),
                else one bit stream per token (`token_stream`), padded at the end of the region
    int8        units of 16 tokens: 16 rows of head_dim int8, then 16 fp16 scales
    dense       page_size rows of head_dim bfloat16

LAYOUT.md is the byte-level specification.  Source: ours.
"""

import torch
from torch import Tensor

from sphkv_codebooks.encoded import EncodedVectors
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.bit_fields import float16_bits, float16_from_bits
from sphkv_kernels.block_words import (
    native_layout_of,
    pack_norms,
    pack_units,
    unpack_norms,
    unpack_units,
)
from sphkv_kernels.int8_code import Int8Vectors
from sphkv_kernels.layout import UNIT_TOKENS, Operand, unit_bytes
from sphkv_kernels.tier import PageError, RegionFormat, TierFormat
from sphkv_kernels.token_stream import pack_stream, row_bytes, unpack_stream
from sphkv_kernels.vectors import StoredVectors

PAGE_SIZES = (16, 32, 64)
REGION_ALIGNMENT = 16


def region_bytes(region_format: RegionFormat, head_dim: int, page_size: int) -> int:
    """Bytes of one region, padding included; the same for keys and values.

    Raises:
        PageError: a page_size that pages do not have, or a code of another head_dim.
    """
    if page_size not in PAGE_SIZES:
        raise PageError(f"page_size {page_size}: choose one of {PAGE_SIZES}")
    if isinstance(region_format, SphericalCode):
        if region_format.head_dim != head_dim:
            raise PageError(
                f"code {region_format.name!r} is for head_dim {region_format.head_dim}, "
                f"the cache has {head_dim}"
            )
        layout = native_layout_of(region_format)
        if layout is None:
            used = page_size * row_bytes(region_format)
        else:
            used = page_size // UNIT_TOKENS * unit_bytes(layout, head_dim)
    elif region_format == "int8":
        used = page_size * (head_dim + 2)
    else:
        used = page_size * head_dim * 2
    return -(-used // REGION_ALIGNMENT) * REGION_ALIGNMENT


def key_region_bytes(tier: TierFormat, head_dim: int, page_size: int) -> int:
    """Bytes of the K region: where the V region of the page begins."""
    return region_bytes(tier.key_format, head_dim, page_size)


def page_bytes(tier: TierFormat, head_dim: int, page_size: int) -> int:
    """Bytes of one page of a tier, a multiple of 16; PageError as `region_bytes`."""
    return key_region_bytes(tier, head_dim, page_size) + region_bytes(
        tier.value_format, head_dim, page_size
    )


def pack_keys(tier: TierFormat, keys: StoredVectors) -> Tensor:
    """K regions ``(n_pages, bytes) uint8`` from stored keys ``(n_pages, page_size, ...)``."""
    return pack_region(tier.key_format, "key", keys)


def pack_values(tier: TierFormat, values: StoredVectors) -> Tensor:
    """V regions ``(n_pages, bytes) uint8`` from stored values ``(n_pages, page_size, ...)``."""
    return pack_region(tier.value_format, "value", values)


def place_pages(pool: Tensor, offsets: Tensor, pages: Tensor) -> None:
    """Write pages ``(n_pages, bytes) uint8`` to their offsets in a pool, by lines of 16 bytes."""
    within = torch.arange(pages.shape[1] // REGION_ALIGNMENT, device=pool.device)
    lines = pages.view(torch.int64).view(pages.shape[0], -1, 2)
    pool.view(torch.int64).view(-1, 2)[offsets[:, None] // REGION_ALIGNMENT + within] = lines


def pack_region(region_format: RegionFormat, operand: Operand, stored: StoredVectors) -> Tensor:
    """Regions ``(n_pages, region_bytes) uint8`` from stored vectors ``(n_pages, page_size, ...)``.

    Every row is written; the caller fills the rows beyond the live tokens as it likes.
    """
    if isinstance(region_format, SphericalCode):
        assert isinstance(stored, EncodedVectors)
        n_pages, page_size = stored.angle_codes[0].shape[:2]
        head_dim = region_format.head_dim
        layout = native_layout_of(region_format)
        if layout is None:
            used = pack_stream(region_format, stored).reshape(n_pages, -1)
        else:
            used = pack_units(region_format, layout, operand, stored)
    elif region_format == "int8":
        assert isinstance(stored, Int8Vectors)
        n_pages, page_size, head_dim = stored.codes.shape
        codes = stored.codes.contiguous().view(torch.uint8).reshape(-1, UNIT_TOKENS * head_dim)
        scales = pack_norms(float16_bits(stored.scales).reshape(-1, UNIT_TOKENS))
        used = torch.cat([codes, scales], dim=1).reshape(n_pages, -1)
    else:
        assert isinstance(stored, Tensor)
        n_pages, page_size, head_dim = stored.shape
        used = stored.to(torch.bfloat16).contiguous().view(torch.uint8).reshape(n_pages, -1)
    total = region_bytes(region_format, head_dim, page_size)
    regions = torch.zeros((n_pages, total), dtype=torch.uint8, device=used.device)
    regions[:, : used.shape[1]] = used
    return regions


def unpack_region(
    region_format: RegionFormat, operand: Operand, regions: Tensor, head_dim: int, page_size: int
) -> StoredVectors:
    """Stored vectors ``(n_pages, page_size, ...)`` from regions ``(n_pages, region_bytes)``."""
    expected = region_bytes(region_format, head_dim, page_size)
    if regions.ndim != 2 or regions.shape[1] != expected or regions.dtype != torch.uint8:
        raise PageError(
            f"regions are {tuple(regions.shape)} {regions.dtype}, expected (n_pages, {expected}) "
            "uint8"
        )
    n_pages = regions.shape[0]
    if isinstance(region_format, SphericalCode):
        layout = native_layout_of(region_format)
        if layout is not None:
            return unpack_units(region_format, layout, operand, regions, page_size)
        width = row_bytes(region_format)
        rows = regions[:, : page_size * width].reshape(n_pages, page_size, width)
        return unpack_stream(region_format, rows)
    if region_format == "int8":
        units = regions.reshape(-1, UNIT_TOKENS * (head_dim + 2))
        codes = units[:, : UNIT_TOKENS * head_dim].contiguous().view(torch.int8)
        scales = float16_from_bits(unpack_norms(units[:, UNIT_TOKENS * head_dim :]))
        return Int8Vectors(
            codes.reshape(n_pages, page_size, head_dim), scales.reshape(n_pages, page_size)
        )
    dense = regions[:, : page_size * head_dim * 2].contiguous().view(torch.bfloat16)
    return dense.reshape(n_pages, page_size, head_dim)
