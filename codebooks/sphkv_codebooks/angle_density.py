"""What a codebook needs to know of a density of angles: the interface.

Level 1 lives on the circle [0, 2 pi), higher levels on [0, pi/2]. All integrals take arrays of
interval ends, in radians, and return float64 arrays of the same shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

TWO_PI = 2.0 * np.pi
HALF_PI = 0.5 * np.pi

# 128 Gauss-Legendre nodes integrate sin^m(2 psi) up to level 8 over the whole of [0, pi/2] to
# 1e-14; the cells of a codebook are narrower. All terms are positive: the error is relative.
_N_NODES = 128


@lru_cache(maxsize=4)
def _legendre(n_nodes: int) -> tuple[FloatArray, FloatArray]:
    nodes, weights = np.polynomial.legendre.leggauss(n_nodes)
    return np.asarray(nodes, dtype=np.float64), np.asarray(weights, dtype=np.float64)


def gauss_nodes(lower: FloatArray, upper: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Quadrature nodes and weights of shape (..., 128) for each interval [lower, upper]."""
    nodes, weights = _legendre(_N_NODES)
    half = 0.5 * (upper - lower)[..., None]
    middle = 0.5 * (upper + lower)[..., None]
    return middle + half * nodes, half * weights


class AngleDensity(ABC):
    """A probability density of one level's angle, normalised to one."""

    is_circle: bool
    """True for level 1: angles live on [0, 2 pi) and intervals may run over its end."""
    is_symmetric: bool
    """True when f(psi) = f(pi/2 - psi): its Lloyd-Max book is then symmetric about pi/4."""

    @property
    def lower(self) -> float:
        """Start of the support, radians."""
        return 0.0

    @property
    def upper(self) -> float:
        """End of the support, radians."""
        return TWO_PI if self.is_circle else HALF_PI

    @abstractmethod
    def pdf(self, psi: npt.ArrayLike) -> FloatArray:
        """Density per radian."""

    @abstractmethod
    def cdf(self, psi: npt.ArrayLike) -> FloatArray:
        """Probability of an angle in [0, psi]."""

    @abstractmethod
    def ppf(self, probability: npt.ArrayLike) -> FloatArray:
        """Quantile: the inverse of cdf."""

    @abstractmethod
    def partial_moments(
        self, lower: FloatArray, upper: FloatArray, origin: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Integrals of (1, psi - origin, (psi - origin)^2) f over each [lower, upper]."""

    @abstractmethod
    def partial_cos_sin(
        self, lower: FloatArray, upper: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Integrals of cos(psi) f and sin(psi) f over each [lower, upper]."""
