"""The dense bit stream: how a page stores codes for which the kernel has no block words.

One row per token, least significant bit first:

    level 1 codes (head_dim / 2 of b_1 bits), ..., level L codes, radii, norm (16 bits),

padded to a whole number of bytes.  Fields and widths as `code_fields` says.  Source: ours.
"""

from torch import Tensor

from sphkv_codebooks.encoded import EncodedVectors
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.bit_fields import pack_fields, unpack_fields
from sphkv_kernels.code_fields import encoded_of, fields_of, has_norm, level_bits, radius_bits


def token_fields(code: SphericalCode) -> list[tuple[int, int]]:
    """``(number of fields, bits)`` of every group of a token's row, in order."""
    fields = [
        (code.head_dim >> level, bits) for level, bits in enumerate(level_bits(code), start=1)
    ]
    fields.append((code.head_dim >> code.depth, radius_bits(code)))
    fields.append((1, 16 if has_norm(code) else 0))
    return fields


def row_bytes(code: SphericalCode) -> int:
    """Bytes of one token's row."""
    return -(-sum(count * bits for count, bits in token_fields(code)) // 8)


def pack_stream(code: SphericalCode, encoded: EncodedVectors) -> Tensor:
    """``(..., row_bytes) uint8`` from encoded vectors ``(...)``."""
    angles, radii, norms = fields_of(code, encoded)
    widths = [bits for _, bits in token_fields(code)]
    return pack_fields(list(zip([*angles, radii, norms], widths, strict=True)), row_bytes(code))


def unpack_stream(code: SphericalCode, rows: Tensor) -> EncodedVectors:
    """The inverse of `pack_stream`."""
    *angles, radii, norms = unpack_fields(rows, token_fields(code))
    return encoded_of(code, angles, radii, norms[..., 0])
