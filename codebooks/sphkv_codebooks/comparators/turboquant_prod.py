"""TurboQuant-prod: (b-1)-bit TurboQuant-MSE plus a 1-bit QJL of what it left.

    k0 = MSE_(b-1)(k),  r = k - k0,   q . k ~ q . k0 + sqrt(pi/2)/d ||r|| <P q, sign(P r)>
    R = b + 32/d  (the norm of k and that of r; at b = 1 they are one)

Unbiased for every q over the draw of P. For isotropic q and unit q, k the mean squared error is
(pi/2 - 1/d) D_(b-1) / d: 1/d of 1.571 .571 .1845 .0543 for b = 1..4 and d -> inf. Plain MSE at the
same b has D_b / d, .363 .117 .0345 .0095: less at every b. What this method buys is unbiasedness.
Source: TurboQuant, arXiv 2504.19874, algorithm 2 and theorem 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from sphkv_codebooks.comparators.coordinate_codebook import coordinate_codebook
from sphkv_codebooks.comparators.interface import (
    FP16_BITS,
    LogitEstimator,
    OrthogonalMap,
    Role,
    check_sizes,
    check_vectors,
)
from sphkv_codebooks.comparators.qjl import Qjl
from sphkv_codebooks.comparators.turboquant_mse import TurboQuantMse
from sphkv_codebooks.errors import CodeError


@dataclass(frozen=True)
class TurboQuantProd(LogitEstimator):
    """bits: 1 to 8 in all. residual: a QJL with head_dim projections."""

    bits: int
    residual: Qjl
    rotation: OrthogonalMap | None = None

    def __post_init__(self) -> None:
        if self.bits < 1:
            raise CodeError(f"TurboQuant-prod needs 1 bit or more, got {self.bits}")
        if self.residual.n_projections != self.residual.head_dim:
            raise CodeError(
                "TurboQuant-prod keeps one sign per coordinate: its QJL needs "
                f"{self.residual.head_dim} projections, got {self.residual.n_projections}"
            )
        coordinate_codebook(self.head_dim, self.bits - 1)

    @classmethod
    def sample(
        cls,
        bits: int,
        head_dim: int,
        generator: np.random.Generator,
        rotation: OrthogonalMap | None = None,
    ) -> TurboQuantProd:
        return cls(bits, Qjl.sample(head_dim, head_dim, generator), rotation)

    @property
    def head_dim(self) -> int:
        return self.residual.head_dim

    @property
    def name(self) -> str:
        return f"TurboQuant-prod {self.bits} bit"

    @property
    def source(self) -> str:
        return "TurboQuant, arXiv 2504.19874, algorithm 2"

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({"keys"})

    @property
    def token_group(self) -> int:
        return 1

    @property
    def table_bytes(self) -> int:
        return 0

    @property
    def inner_product_error(self) -> float:
        """d E (estimate - q . k)^2 for unit k and isotropic unit q."""
        left_over = coordinate_codebook(self.head_dim, self.bits - 1).distortion
        return (math.pi / 2 - 1 / self.head_dim) * left_over

    def rate(self, head_dim: int, n_tokens: int) -> float:
        check_sizes(head_dim, n_tokens, self.head_dim)
        n_norms = 1 if self.bits == 1 else 2
        return self.bits + n_norms * FP16_BITS / head_dim

    def logits(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        check_vectors(keys, self.head_dim)
        if self.bits == 1:
            return self.residual.logits(queries, keys)
        coarse = TurboQuantMse(self.bits - 1, self.head_dim, self.rotation).reconstruct(keys)
        return queries @ coarse.transpose(-1, -2) + self.residual.logits(queries, keys - coarse)
