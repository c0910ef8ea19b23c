"""QJL: one sign per random projection of a key, and the key's norm.

    stored: sign(S k) (m bits), ||k|| (fp16);   q . k ~ sqrt(pi/2) / m * ||k|| <S q, sign(S k)>
    E = q . k,   Var = ((pi/2) ||q||^2 ||k||^2 - (q . k)^2) / m <= (pi/2m) ||q||^2 ||k||^2
    R = (m + 16)/d

with S (m x d) of independent N(0, 1) entries, shared by all tokens; the query stays exact.
Source: QJL, arXiv 2406.03482 (the bound); the exact variance is ours: sign(s . k) s has the second
moment I. The paper's separate treatment of outlier channels is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sphkv_codebooks.comparators.interface import (
    FP16_BITS,
    LogitEstimator,
    Role,
    check_sizes,
    check_vectors,
    stored_in_fp16,
)
from sphkv_codebooks.errors import CodeError


@dataclass(frozen=True, eq=False)
class Qjl(LogitEstimator):
    """projection: (n_projections, head_dim), float64, independent N(0, 1) entries."""

    projection: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        projection = np.array(self.projection, dtype=np.float64)
        if projection.ndim != 2 or 0 in projection.shape or not np.isfinite(projection).all():
            raise CodeError(
                "QJL needs a finite projection of shape (n_projections, head_dim), "
                f"got shape {projection.shape}"
            )
        projection.setflags(write=False)
        object.__setattr__(self, "projection", projection)

    @classmethod
    def sample(cls, head_dim: int, n_projections: int, generator: np.random.Generator) -> Qjl:
        """A fresh projection. n_projections = head_dim is one bit per coordinate."""
        return cls(generator.standard_normal((n_projections, head_dim)))

    @property
    def n_projections(self) -> int:
        return int(self.projection.shape[0])

    @property
    def head_dim(self) -> int:
        return int(self.projection.shape[1])

    @property
    def name(self) -> str:
        return f"QJL {self.n_projections} signs"

    @property
    def source(self) -> str:
        return "QJL, arXiv 2406.03482"

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({"keys"})

    @property
    def token_group(self) -> int:
        return 1

    @property
    def table_bytes(self) -> int:
        return 0

    def rate(self, head_dim: int, n_tokens: int) -> float:
        check_sizes(head_dim, n_tokens, self.head_dim)
        return (self.n_projections + FP16_BITS) / head_dim

    def logits(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        check_vectors(keys, self.head_dim)
        check_vectors(queries, self.head_dim)
        projection = torch.tensor(self.projection, device=keys.device, dtype=keys.dtype)
        projected = keys @ projection.T
        # The sign of 0 is +1: a zero key is silenced by its norm, not by its signs.
        signs = torch.where(projected < 0, -1.0, 1.0).to(keys.dtype)
        norm = torch.linalg.vector_norm(keys, dim=-1)
        weight = stored_in_fp16(norm, "a key's norm") * (
            math.sqrt(math.pi / 2) / self.n_projections
        )
        asked = queries.to(keys.dtype) @ projection.T
        return (asked @ signs.transpose(-1, -2)) * weight.unsqueeze(-2)
