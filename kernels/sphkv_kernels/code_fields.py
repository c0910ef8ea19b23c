"""The integer fields of a coded vector: what any layout has to store, and how wide each is.

``b_l = ceil(log2 n_cells_l)`` bits for an angle of level l that is stored on its own (levels whose
number of cells is no power of two share words: `mixed_radix`); a radius is 16 bits (fp16) or the
bits of its coding; the norm is 16 bits where the coding has one.  Source: ours.
"""

import torch
from torch import Tensor

from sphkv_codebooks.encoded import EncodedVectors
from sphkv_codebooks.radius import Fp16Radius, LloydMaxRadius, MinifloatRadius
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.bit_fields import float16_bits, float16_from_bits


def level_bits(code: SphericalCode) -> tuple[int, ...]:
    """Whole bits that hold one angle code of each level."""
    return tuple((n_cells - 1).bit_length() for n_cells in code.n_cells)


def radius_bits(code: SphericalCode) -> int:
    """Stored bits of each of the n_radii radii; 0 where the norm says it all."""
    return code.radius_coding.bits_per_radius


def has_norm(code: SphericalCode) -> bool:
    """Whether a vector stores its fp16 norm."""
    return code.radius_coding.norm_bits > 0


def native_radius_name(code: SphericalCode) -> str | None:
    """How `layout` names this radius coding; None for one that the kernel does not read."""
    coding = code.radius_coding
    if isinstance(coding, Fp16Radius):
        return "fp16"
    if isinstance(coding, LloydMaxRadius):
        return "lloyd_max"
    # Only 5 exponent bits make the code the top of an fp16 pattern.
    if isinstance(coding, MinifloatRadius) and coding.exponent_bits == 5:
        return "minifloat"
    return None


def fields_of(code: SphericalCode, encoded: EncodedVectors) -> tuple[list[Tensor], Tensor, Tensor]:
    """``(angle codes per level, radius fields (..., n_radii), norm field (..., 1))`` as integers.

    A radius or norm that the coding does not have is zero, to be written with 0 bits.
    """
    device = encoded.angle_codes[0].device
    if encoded.radius_codes is not None:
        radii = encoded.radius_codes
    elif encoded.radii is not None:
        radii = float16_bits(encoded.radii)
    else:
        radii = torch.zeros((*encoded.shape, code.n_radii), dtype=torch.int64, device=device)
    if encoded.norms is not None:
        norms = float16_bits(encoded.norms)[..., None]
    else:
        norms = torch.zeros((*encoded.shape, 1), dtype=torch.int64, device=device)
    return list(encoded.angle_codes), radii, norms


def encoded_of(
    code: SphericalCode, angles: list[Tensor], radii: Tensor, norms: Tensor
) -> EncodedVectors:
    """The inverse of `fields_of`; norms ``(...)``."""
    coding = code.radius_coding
    is_fp16 = isinstance(coding, Fp16Radius)
    has_codes = coding.bits_per_radius > 0 and not is_fp16
    code_dtype = torch.int16 if isinstance(coding, MinifloatRadius) else torch.uint8
    return EncodedVectors(
        angle_codes=tuple(codes.to(torch.uint8) for codes in angles),
        radius_codes=radii.to(code_dtype) if has_codes else None,
        radii=float16_from_bits(radii) if is_fp16 else None,
        norms=float16_from_bits(norms) if has_norm(code) else None,
    )
