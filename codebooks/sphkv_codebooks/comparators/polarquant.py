"""PolarQuant as in its paper: depth 4, 4/2/2/2 bits per angle, an fp16 radius per 16 coordinates.

    xhat = S^T Q(S x),      R = (8 x 4 + 4 x 2 + 2 x 2 + 2 + 16) / 16 = 3.875

Charged with the bits of its codes and radii alone, as every rival is charged: no page, no word that
its blocks do not fill.  Our own codes in our pages are in `sphkv_kernels`.
Source: PolarQuant, arXiv 2502.02617, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from sphkv_codebooks.comparators.interface import (
    OrthogonalMap,
    Role,
    VectorQuantizer,
    check_sizes,
    check_vectors,
)
from sphkv_codebooks.spherical_code import SphericalCode

BITS, RADIUS = (4, 2, 2, 2), "fp16"


@dataclass(frozen=True)
class PolarQuant(VectorQuantizer):
    """rotation: None when the vectors already lie in a rotated frame."""

    head_dim: int
    rotation: OrthogonalMap | None = None

    @property
    def name(self) -> str:
        return "PolarQuant 4/2/2/2, fp16 radii"

    @property
    def source(self) -> str:
        return "PolarQuant, arXiv 2502.02617"

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({"keys", "values"})

    @property
    def token_group(self) -> int:
        return 1

    @property
    def table_bytes(self) -> int:
        return 0

    @cached_property
    def code(self) -> SphericalCode:
        """The paper's code with books from the analytic densities.

        Raises:
            CodeError: head_dim has no four levels.
        """
        return SphericalCode.analytic(self.name, self.head_dim, BITS, RADIUS)

    def rate(self, head_dim: int, n_tokens: int) -> float:
        check_sizes(head_dim, n_tokens, self.head_dim)
        return self.code.code_rate

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        check_vectors(x, self.head_dim)
        framed = x if self.rotation is None else self.rotation.apply(x)
        decoded = self.code.decode(self.code.encode(framed), x.dtype)
        return decoded if self.rotation is None else self.rotation.apply_inverse(decoded)
