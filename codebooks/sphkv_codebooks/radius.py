"""How the radii of the last level are stored.

fp16           one float16 per block.
norm           full depth: the one radius is the norm, one float16 per vector.
minifloat:e,m  e exponent and m mantissa bits per block, no sign, no norm.
lloyd_max:b    b bits per block against one float16 norm per vector: the code is the Lloyd-Max
               cell of rho = r sqrt(n_radii) / norm (radius_density.py).
"""

from __future__ import annotations

from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.lloyd_max_radius import LloydMaxRadius
from sphkv_codebooks.minifloat_radius import MinifloatRadius
from sphkv_codebooks.radius_coding import (
    FP16_MAX,
    Fp16Radius,
    NormRadius,
    RadiusCoding,
    RadiusMoments,
    StoredRadii,
    to_fp16,
)

__all__ = [
    "FP16_MAX",
    "Fp16Radius",
    "LloydMaxRadius",
    "MinifloatRadius",
    "NormRadius",
    "RadiusCoding",
    "RadiusMoments",
    "StoredRadii",
    "radius_coding_from_spec",
    "to_fp16",
]


def radius_coding_from_spec(spec: str, block_dim: int, head_dim: int) -> RadiusCoding:
    """Read "fp16", "norm", "minifloat:e,m" or "lloyd_max:b"."""
    name, _, arguments = spec.partition(":")
    try:
        numbers = [int(part) for part in arguments.split(",")] if arguments else []
    except ValueError:
        numbers = [-1]
    if name == "fp16" and not arguments:
        return Fp16Radius()
    if name == "norm" and not arguments:
        return NormRadius()
    if name == "minifloat" and len(numbers) == 2:
        return MinifloatRadius(*numbers)
    if name == "lloyd_max" and len(numbers) == 1:
        return LloydMaxRadius.design(numbers[0], block_dim, head_dim)
    raise CodeError(
        f"radius coding {spec!r} is unknown: use fp16, norm, lloyd_max:2 or minifloat:5,6"
    )
