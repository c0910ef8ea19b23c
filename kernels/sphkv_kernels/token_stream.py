"""The dense bit stream: how a page stores codes for which the kernel has no block words.

One row per token, least significant bit first:

    codes of the levels with 2^b cells (head_dim / 2^l fields of b bits each, ascending l), radii,
    norm (16 bits), words of mixed radix with the codes of all other levels (ascending l)

padded to a whole number of bytes.  Fields and widths as `code_fields` says, words as `mixed_radix`.
Source: ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sphkv_codebooks.encoded import EncodedVectors
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.bit_fields import pack_fields, unpack_fields
from sphkv_kernels.code_fields import encoded_of, fields_of, has_norm, level_bits, radius_bits
from sphkv_kernels.mixed_radix import digit_fields, digit_layout, digits_of, word_bits


def row_bytes(code: SphericalCode) -> int:
    """Bytes of one token's row."""
    coding = code.radius_coding
    overhead = code.n_radii * coding.bits_per_radius + coding.norm_bits
    return -(-(angle_bits(code.head_dim, code.n_cells) + overhead) // 8)


def angle_bits(head_dim: int, n_cells: Sequence[int]) -> int:
    """Bits that the angle codes of one token take in its row."""
    plain = sum(
        (head_dim >> level) * (cells.bit_length() - 1)
        for level, cells in enumerate(n_cells, start=1)
        if _is_whole(cells)
    )
    return plain + word_bits(_radices(head_dim, n_cells))


def pack_stream(code: SphericalCode, encoded: EncodedVectors) -> Tensor:
    """``(..., row_bytes) uint8`` from encoded vectors ``(...)``."""
    angles, radii, norms = fields_of(code, encoded)
    widths = [bits for _, bits in _plain_fields(code)]
    plain = [angles[level] for level in _levels(code, whole=True)]
    groups = list(zip([*plain, radii, norms], widths, strict=True))
    split = _levels(code, whole=False)
    if split:
        digits = torch.cat([angles[level] for level in split], dim=-1)
        groups += digit_fields(digits, _radices(code.head_dim, code.n_cells))
    return pack_fields(groups, row_bytes(code))


def unpack_stream(code: SphericalCode, rows: Tensor) -> EncodedVectors:
    """The inverse of `pack_stream`."""
    layout = _plain_fields(code)
    radices = _radices(code.head_dim, code.n_cells)
    groups = unpack_fields(rows, [*layout, *digit_layout(radices)])
    *plain, radii, norms = groups[: len(layout)]
    angles = dict(zip(_levels(code, whole=True), plain, strict=True))
    split = _levels(code, whole=False)
    if split:
        digits = digits_of(groups[len(layout) :], radices)
        counts = [code.n_angles[level] for level in split]
        angles.update(zip(split, torch.split(digits, counts, dim=-1), strict=True))
    return encoded_of(code, [angles[level] for level in range(code.depth)], radii, norms[..., 0])


def _is_whole(n_cells: int) -> bool:
    return n_cells & (n_cells - 1) == 0


def _levels(code: SphericalCode, *, whole: bool) -> list[int]:
    """Indices of the levels whose number of cells is, or is not, a power of two."""
    return [index for index, n_cells in enumerate(code.n_cells) if _is_whole(n_cells) == whole]


def _plain_fields(code: SphericalCode) -> list[tuple[int, int]]:
    """``(number of fields, bits)`` of every group of whole bits of a token's row, in order."""
    bits = level_bits(code)
    fields = [(code.n_angles[index], bits[index]) for index in _levels(code, whole=True)]
    fields.append((code.n_radii, radius_bits(code)))
    fields.append((1, 16 if has_norm(code) else 0))
    return fields


def _radices(head_dim: int, n_cells: Sequence[int]) -> tuple[int, ...]:
    """One radix per digit of the levels that are stored in mixed radix."""
    return tuple(
        cells
        for level, cells in enumerate(n_cells, start=1)
        if not _is_whole(cells)
        for _ in range(head_dim >> level)
    )
