"""TurboQuant-MSE: a norm, a rotation, and one Lloyd-Max book for every coordinate.

    k = ||x||,  u = S x sqrt(d) / k,  xhat = (k / sqrt(d)) S^T Q_b(u),      R = b + 16/d

Q_b is the Lloyd-Max quantiser of a coordinate of the unit sphere (Beta, not its Gaussian limit).
D = E||x - xhat||^2 / ||x||^2: .36338 .117482 .034548 .009501 .002505 for b = 1..5 and d -> inf.
Source: TurboQuant, arXiv 2504.19874, algorithm 1; the norm as section 1 there, kept in fp16.
The rotation before a scalar quantiser is DRIVE's (NeurIPS 2021) and EDEN's (ICML 2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sphkv_codebooks.comparators.coordinate_codebook import (
    CoordinateCodebook,
    coordinate_codebook,
)
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


@dataclass(frozen=True)
class TurboQuantMse(VectorQuantizer):
    """bits: 1 to 8. rotation: None when the vectors already lie in a rotated frame."""

    bits: int
    head_dim: int
    rotation: OrthogonalMap | None = None

    def __post_init__(self) -> None:
        if self.bits < 1:
            raise CodeError(f"TurboQuant-MSE needs 1 bit or more, got {self.bits}")
        coordinate_codebook(self.head_dim, self.bits)  # refuses what it cannot design

    @property
    def name(self) -> str:
        return f"TurboQuant-MSE {self.bits} bit"

    @property
    def source(self) -> str:
        return "TurboQuant, arXiv 2504.19874, algorithm 1"

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({"keys", "values"})

    @property
    def token_group(self) -> int:
        return 1

    @property
    def table_bytes(self) -> int:
        return 0

    @property
    def codebook(self) -> CoordinateCodebook:
        return coordinate_codebook(self.head_dim, self.bits)

    @property
    def distortion(self) -> float:
        """D under a uniformly random rotation, for any vector; the norm's rounding left out."""
        return self.codebook.distortion

    def rate(self, head_dim: int, n_tokens: int) -> float:
        check_sizes(head_dim, n_tokens, self.head_dim)
        return self.bits + FP16_BITS / head_dim

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        check_vectors(x, self.head_dim)
        rotated = x if self.rotation is None else self.rotation.apply(x)
        decoded = quantize_unit_direction(rotated, self.codebook)
        return decoded if self.rotation is None else self.rotation.apply_inverse(decoded)


def quantize_unit_direction(rotated: torch.Tensor, book: CoordinateCodebook) -> torch.Tensor:
    """||x|| (in fp16) times the coded direction of rotated vectors, still rotated."""
    root_d = math.sqrt(rotated.shape[-1])
    norm = torch.linalg.vector_norm(rotated, dim=-1, keepdim=True)
    coded = book.quantize(divide_or_zero(rotated, norm) * root_d)
    return coded * (stored_in_fp16(norm, "a vector's norm") / root_d)
