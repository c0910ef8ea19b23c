"""The shared orthogonal rotation S: x -> S x on the last axis.

Rotation before coarse quantisation is DRIVE's technique (Vargaftik et al., NeurIPS 2021, arXiv
2105.08339; EDEN, ICML 2022, arXiv 2108.08842); PolarQuant and TurboQuant use it for KV caches. S
must be orthogonal: an i.i.d. Gaussian S / sqrt(d) undone by its transpose costs D = 1 + 1/d with no
quantisation at all.

haar: Q of the QR decomposition of a Gaussian matrix from numpy's PCG64(seed), columns signed by
diag(R) so that Q is Haar distributed. hadamard: H diag(signs) / sqrt(d), H in Sylvester's order;
the fast transform adds and subtracts at stride 1, then 2, 4, ..., and scales last.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch

from sphkv_codebooks.density import FloatArray
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.polar import check_head_dim

RotationKind = Literal["haar", "hadamard", "none"]

# QR may differ in the last bits between LAPACK builds; the digest must not.
_DIGEST_DECIMALS = 6

# Vectors whose transform stays in a core's cache.
_CHUNK_CPU = 1024


@lru_cache(maxsize=32)
def _signs(head_dim: int, seed: int) -> FloatArray:
    return np.random.default_rng(seed).integers(0, 2, head_dim).astype(np.float64) * 2.0 - 1.0


@lru_cache(maxsize=32)
def _haar(head_dim: int, seed: int) -> FloatArray:
    gaussian = np.random.default_rng(seed).standard_normal((head_dim, head_dim))
    q, r = np.linalg.qr(gaussian)
    return np.asarray(q * np.sign(np.diag(r)), dtype=np.float64)


@lru_cache(maxsize=16)
def _sylvester(head_dim: int) -> FloatArray:
    h = np.ones((1, 1))
    while h.shape[0] < head_dim:
        h = np.block([[h, h], [h, -h]])
    return h


@dataclass(frozen=True)
class Rotation:
    """An orthogonal (head_dim, head_dim) matrix, reproducible from kind, head_dim and seed."""

    kind: RotationKind
    head_dim: int
    seed: int = 42
    stored_matrix: FloatArray | None = field(default=None, repr=False, compare=False)
    """The very matrix another machine used, where QR may differ in its last bits; checked."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(RotationKind):
            raise CodeError(f"rotation must be haar, hadamard or none, got {self.kind!r}")
        check_head_dim(self.head_dim)
        if self.seed < 0:
            raise CodeError(f"a rotation's seed must be >= 0, got {self.seed}")
        if self.stored_matrix is not None:
            given = np.array(self.stored_matrix, dtype=np.float64)
            expected = self._generate()
            if given.shape != expected.shape or not np.allclose(given, expected, rtol=0, atol=1e-9):
                raise CodeError(
                    f"the stored {self.kind} matrix is not the one of seed {self.seed} and "
                    f"head_dim {self.head_dim}: the file is damaged or from another rotation"
                )
            given.setflags(write=False)
            object.__setattr__(self, "stored_matrix", given)

    def _generate(self) -> FloatArray:
        if self.kind == "none":
            return np.eye(self.head_dim)
        if self.kind == "haar":
            return _haar(self.head_dim, self.seed)
        scale = float(self.head_dim**-0.5)
        return _sylvester(self.head_dim) * _signs(self.head_dim, self.seed) * scale

    def matrix(self) -> FloatArray:
        """S, (head_dim, head_dim) float64."""
        return (self.stored_matrix if self.stored_matrix is not None else self._generate()).copy()

    @property
    def signs(self) -> FloatArray:
        """The diagonal (head_dim,) of +-1 of a hadamard rotation."""
        if self.kind != "hadamard":
            raise CodeError(f"a {self.kind} rotation has no signs")
        return _signs(self.head_dim, self.seed).copy()

    @property
    def digest(self) -> str:
        """SHA-256 hex of kind and matrix, float64 little endian, rounded to 6 decimals."""
        rounded = np.round(self.matrix(), _DIGEST_DECIMALS) + 0.0  # + 0.0 turns -0 into 0
        content = rounded.astype("<f8").tobytes()
        return hashlib.sha256(self.kind.encode() + content).hexdigest()

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """S x on the last axis, (..., head_dim), in x's dtype and on its device."""
        self._check(x)
        if self.kind == "none":
            return x
        if self.kind == "haar":
            return x @ self._matrix_like(x).T
        return _fast_hadamard(x * self._signs_like(x)) * float(self.head_dim**-0.5)

    def apply_inverse(self, x: torch.Tensor) -> torch.Tensor:
        """S^T x on the last axis."""
        self._check(x)
        if self.kind == "none":
            return x
        if self.kind == "haar":
            return x @ self._matrix_like(x)
        return _fast_hadamard(x) * self._signs_like(x) * float(self.head_dim**-0.5)

    def _matrix_like(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.matrix(), device=x.device).to(x.dtype)

    def _signs_like(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(_signs(self.head_dim, self.seed), device=x.device).to(x.dtype)

    def _check(self, x: torch.Tensor) -> None:
        if x.shape[-1] != self.head_dim:
            raise CodeError(
                f"the rotation has head_dim {self.head_dim}, the tensor {tuple(x.shape)}: "
                "they belong to different models"
            )


def _fast_hadamard(x: torch.Tensor) -> torch.Tensor:
    """H x in Sylvester's order, strides 1, 2, 4, ..., coordinate-major in chunks of vectors."""
    flat = x.reshape(-1, x.shape[-1])
    size = _CHUNK_CPU if x.device.type == "cpu" else max(flat.shape[0], 1)
    chunks = [_butterflies(flat[start : start + size]) for start in range(0, flat.shape[0], size)]
    return torch.cat(chunks).reshape(x.shape) if chunks else x


def _butterflies(x: torch.Tensor) -> torch.Tensor:
    """(n_vectors, d) -> the same; differentiable."""
    n_vectors, d = x.shape
    columns = x.T
    stride = 1
    while stride < d:
        pairs = columns.reshape(d // (2 * stride), 2, stride, n_vectors)
        upper, lower = pairs[:, 0], pairs[:, 1]
        columns = torch.stack((upper + lower, upper - lower), dim=1)
        stride *= 2
    return columns.reshape(d, n_vectors).T
