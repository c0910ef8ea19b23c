"""Lloyd-Max books for one coordinate of a uniformly rotated vector.

A coordinate t of a point uniform on the unit sphere of R^d has density

    f(t) = (1 - t^2)^((d-3)/2) / B(1/2, (d-1)/2),  |t| <= 1,  (1 + t)/2 ~ Beta((d-1)/2, (d-1)/2)

(TurboQuant, arXiv 2504.19874, section 3). Here u = sqrt(d) t, of variance 1, so that d -> inf is
the standard normal of EDEN. The book's distortion is D = E (u - c)^2, that of the whole unit
vector. The fixed point is a root of g_i = t_i - (c_i + c_(i+1))/2; the densities are log-concave,
so it is the only one (Fleischer 1964).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from scipy import optimize, special

from sphkv_codebooks.errors import CodeError

FloatArray = npt.NDArray[np.float64]

GAUSSIAN = 0
"""head_dim of the limit d -> inf: the standard normal."""

MAX_BITS = 8


@dataclass(frozen=True, eq=False)
class CoordinateCodebook:
    """centroids: (2^bits,), thresholds: (2^bits - 1,), of a coordinate of variance 1."""

    head_dim: int
    centroids: FloatArray
    thresholds: FloatArray
    distortion: float

    def __post_init__(self) -> None:
        self.centroids.setflags(write=False)
        self.thresholds.setflags(write=False)

    def encode(self, u: torch.Tensor) -> torch.Tensor:
        """Codes, uint8, of coordinates of variance 1; any shape."""
        thresholds = torch.tensor(self.thresholds, device=u.device, dtype=u.dtype)
        return torch.bucketize(u.contiguous(), thresholds).to(torch.uint8)

    def decode(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The centroid of each code, same shape."""
        centroids = torch.tensor(self.centroids, device=codes.device, dtype=dtype)
        return torch.index_select(centroids, 0, codes.flatten().int()).reshape(codes.shape)

    def quantize(self, u: torch.Tensor) -> torch.Tensor:
        """The centroid of each coordinate of variance 1; any shape, same dtype."""
        return self.decode(self.encode(u), u.dtype)


@lru_cache(maxsize=64)
def coordinate_codebook(head_dim: int, bits: int) -> CoordinateCodebook:
    """The Lloyd-Max book of `bits` bits for head_dim, or for head_dim GAUSSIAN the normal's."""
    if head_dim != GAUSSIAN and head_dim < 4:
        raise CodeError(f"coordinate books need head_dim 4 or more, got {head_dim}")
    if not 0 <= bits <= MAX_BITS:
        raise CodeError(f"coordinate books have 0 to {MAX_BITS} bits, got {bits}")
    if bits == 0:
        return CoordinateCodebook(head_dim, np.zeros(1), np.zeros(0), 1.0)
    half = _positive_thresholds(head_dim, 2 ** (bits - 1))
    mass, first = _cell_moments(head_dim, half)
    centroids = first / mass
    # Of variance 1 and with c = E[u | cell]: E (u - c)^2 = 1 - E c^2, both signs counted.
    distortion = 1.0 - 2.0 * float((first * centroids).sum())
    return CoordinateCodebook(
        head_dim,
        np.concatenate([-centroids[::-1], centroids]),
        np.concatenate([-half[::-1], [0.0], half]),
        distortion,
    )


def _positive_thresholds(head_dim: int, n_cells: int) -> FloatArray:
    """(n_cells - 1,) thresholds above 0 of the symmetric book with 2 n_cells cells."""
    quantiles = 0.5 + 0.5 * np.arange(1, n_cells) / n_cells
    thresholds = _quantile(head_dim, quantiles)
    if n_cells == 1:
        return thresholds

    def lloyd_step(inner: FloatArray) -> FloatArray:
        mass, first = _cell_moments(head_dim, inner)
        centroids = first / mass
        return np.asarray(0.5 * (centroids[:-1] + centroids[1:]))

    # Lloyd's own iteration needs thousands of rounds at 5 bits.
    solution = optimize.root(lambda t: t - lloyd_step(t), thresholds, tol=1e-14)
    root = np.asarray(solution.x, dtype=np.float64)
    residual = float(np.abs(root - lloyd_step(root)).max())
    if residual > 1e-9 or (np.diff(np.concatenate([[0.0], root])) <= 0).any():
        raise CodeError(
            f"the coordinate book of {2 * n_cells} cells for head_dim {head_dim} did not settle "
            f"(residual {residual:.2g})"
        )
    return root


def _quantile(head_dim: int, probability: FloatArray) -> FloatArray:
    if head_dim == GAUSSIAN:
        return np.asarray(special.ndtri(probability), dtype=np.float64)
    a = 0.5 * (head_dim - 1)
    return np.asarray(math.sqrt(head_dim) * (2 * special.betaincinv(a, a, probability) - 1))


def _cell_moments(head_dim: int, inner: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Integrals of f and u f over the cells between 0, inner and the end of the support."""
    if head_dim == GAUSSIAN:
        edges = np.concatenate([[0.0], inner, [np.inf]])
        # Upper tails, not the cdf: their differences keep their digits far out.
        tail = special.ndtr(-edges)
        density = np.exp(-0.5 * edges**2) / math.sqrt(2 * math.pi)
        return tail[:-1] - tail[1:], density[:-1] - density[1:]
    root_d = math.sqrt(head_dim)
    edges = np.clip(np.concatenate([[0.0], inner, [root_d]]) / root_d, -1.0, 1.0)
    a = 0.5 * (head_dim - 1)
    tail = special.betainc(a, a, 0.5 * (1.0 - edges))
    # The antiderivative of t f(t) is -(1 - t^2)^((d-1)/2) / ((d - 1) B(1/2, (d-1)/2)).
    density = root_d * (1.0 - edges**2) ** a / ((head_dim - 1) * special.beta(0.5, a))
    return tail[:-1] - tail[1:], density[:-1] - density[1:]
