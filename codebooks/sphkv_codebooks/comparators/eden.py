"""DRIVE and EDEN: a rotation, a scalar book of the normal, and one scale that corrects the gain.

    y = S x,  c = Q_b(y sqrt(d) / ||y||),  xhat = s S^T c,                R = b + 16/d
    s = <y, c> / ||c||^2    least squares: the least error
    s = ||y||^2 / <y, c>    unbiased: E xhat = x over S, and <x, xhat> = ||x||^2 for every S
    s = ||y|| / ||c||       matched norm: ||xhat|| = ||x||

DRIVE is b = 1 (c = sign(y) up to the scale). The error over ||x||^2 (vNMSE) for d -> inf and
b = 1..4 is D_b with least squares, .3634 .11748 .03455 .00950, and D_b / (1 - D_b) unbiased,
.5708 .13312 .03578 .00959. The scale carries the vector's norm and is kept in fp16.
Source: DRIVE, arXiv 2105.08339 (NeurIPS 2021); EDEN, arXiv 2108.08842 (ICML 2022). The matched
norm, the geometric mean of the two others, is what some engines use (arXiv 2604.18555).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from sphkv_codebooks.comparators.coordinate_codebook import GAUSSIAN, coordinate_codebook
from sphkv_codebooks.comparators.interface import (
    FP16_BITS,
    OrthogonalMap,
    Role,
    VectorQuantizer,
    check_sizes,
    check_vectors,
    divide_or_zero,
    stored_in_fp16,
)
from sphkv_codebooks.errors import CodeError

Gain = Literal["least_squares", "unbiased", "matched_norm"]
GAINS: tuple[Gain, ...] = ("least_squares", "unbiased", "matched_norm")


@dataclass(frozen=True)
class Eden(VectorQuantizer):
    """bits: 1 (DRIVE) to 8. rotation: None when the vectors already lie in a rotated frame."""

    bits: int
    head_dim: int
    gain: Gain
    rotation: OrthogonalMap | None = None

    def __post_init__(self) -> None:
        if self.bits < 1 or self.head_dim < 1:
            raise CodeError(
                f"EDEN needs 1 bit and 1 coordinate or more, got {self.bits}, {self.head_dim}"
            )
        if self.gain not in GAINS:
            raise CodeError(f"EDEN's gain is one of {', '.join(GAINS)}, not {self.gain!r}")
        coordinate_codebook(GAUSSIAN, self.bits)

    @property
    def name(self) -> str:
        method = "DRIVE" if self.bits == 1 else "EDEN"
        return f"{method} {self.bits} bit, {self.gain.replace('_', ' ')}"

    @property
    def source(self) -> str:
        return "DRIVE, arXiv 2105.08339; EDEN, arXiv 2108.08842"

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({"keys", "values"})

    @property
    def token_group(self) -> int:
        return 1

    @property
    def table_bytes(self) -> int:
        return 0

    def rate(self, head_dim: int, n_tokens: int) -> float:
        check_sizes(head_dim, n_tokens, self.head_dim)
        return self.bits + FP16_BITS / head_dim

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        check_vectors(x, self.head_dim)
        y = x if self.rotation is None else self.rotation.apply(x)
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        unit = divide_or_zero(y, norm)
        coded = coordinate_codebook(GAUSSIAN, self.bits).quantize(unit * math.sqrt(self.head_dim))
        # A coordinate and its centroid have one sign, so <unit, coded> > 0 unless the vector is 0.
        agreement = (unit * coded).sum(-1, keepdim=True)
        energy = (coded * coded).sum(-1, keepdim=True)
        if self.gain == "least_squares":
            per_norm = agreement / energy
        elif self.gain == "unbiased":
            per_norm = divide_or_zero(torch.ones_like(agreement), agreement)
        else:
            per_norm = energy.rsqrt()
        decoded = coded * stored_in_fp16(norm * per_norm, "a vector's scale")
        return decoded if self.rotation is None else self.rotation.apply_inverse(decoded)
