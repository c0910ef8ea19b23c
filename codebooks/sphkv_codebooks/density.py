"""Angle densities of the recursive polar transform.

For Gaussian (or uniform-on-sphere) input the angle of level 1 is uniform on the circle [0, 2 pi),
and for level l >= 2 (PolarQuant, arXiv 2502.02617, section 3)

    f(psi) = sin^m(2 psi) / Z_l  on [0, pi/2],   m = 2^(l-1) - 1,
    sin^2(psi) ~ Beta(a, a),                     a = 2^(l-2),

so that CDF, quantiles and the integrals of cos and sin are incomplete beta functions.
Measured angles: empirical_density.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from sphkv_codebooks.angle_density import (
    HALF_PI,
    TWO_PI,
    AngleDensity,
    FloatArray,
    gauss_nodes,
)
from sphkv_codebooks.empirical_density import EmpiricalDensity
from sphkv_codebooks.errors import CodeError

__all__ = [
    "HALF_PI",
    "TWO_PI",
    "AngleDensity",
    "EmpiricalDensity",
    "FloatArray",
    "SinPower",
    "UniformCircle",
    "analytic_density",
    "gauss_nodes",
]

MAX_LEVEL = 16


@dataclass(frozen=True)
class UniformCircle(AngleDensity):
    """Level 1 of isotropic data: f = 1 / (2 pi) on the circle."""

    is_circle = True
    is_symmetric = False

    def pdf(self, psi: npt.ArrayLike) -> FloatArray:
        return np.full(np.shape(psi), 1.0 / TWO_PI)

    def cdf(self, psi: npt.ArrayLike) -> FloatArray:
        return np.clip(np.asarray(psi, dtype=np.float64) / TWO_PI, 0.0, 1.0)

    def ppf(self, probability: npt.ArrayLike) -> FloatArray:
        return np.asarray(probability, dtype=np.float64) * TWO_PI

    def partial_moments(
        self, lower: FloatArray, upper: FloatArray, origin: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        a, b = lower - origin, upper - origin
        return (
            (upper - lower) / TWO_PI,
            (b**2 - a**2) / (2 * TWO_PI),
            (b**3 - a**3) / (3 * TWO_PI),
        )

    def partial_cos_sin(
        self, lower: FloatArray, upper: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        return (
            (np.sin(upper) - np.sin(lower)) / TWO_PI,
            (np.cos(lower) - np.cos(upper)) / TWO_PI,
        )


@dataclass(frozen=True)
class SinPower(AngleDensity):
    """Level l >= 2 of isotropic data: f proportional to sin^m(2 psi), m = 2^(l-1) - 1."""

    level: int
    is_circle = False
    is_symmetric = True

    def __post_init__(self) -> None:
        if not 2 <= self.level <= MAX_LEVEL:
            raise CodeError(
                f"SinPower describes levels 2 to {MAX_LEVEL}, not level {self.level}; "
                "level 1 is UniformCircle"
            )

    @property
    def exponent(self) -> int:
        """m of sin^m(2 psi)."""
        return int(2 ** (self.level - 1)) - 1

    @property
    def beta_shape(self) -> float:
        """a of sin^2(psi) ~ Beta(a, a)."""
        return float(2.0 ** (self.level - 2))

    @property
    def normaliser(self) -> float:
        """Z_l, the integral of sin^m(2 psi) over [0, pi/2]: half of B(1/2, (m + 1) / 2)."""
        return float(0.5 * special.beta(0.5, 0.5 * (self.exponent + 1)))

    def pdf(self, psi: npt.ArrayLike) -> FloatArray:
        psi = np.asarray(psi, dtype=np.float64)
        inside = (psi >= 0.0) & (psi <= HALF_PI)
        sine = np.maximum(np.sin(2.0 * psi), 0.0)
        return np.where(inside, sine**self.exponent / self.normaliser, 0.0)

    def cdf(self, psi: npt.ArrayLike) -> FloatArray:
        psi = np.clip(np.asarray(psi, dtype=np.float64), 0.0, HALF_PI)
        a = self.beta_shape
        return np.asarray(special.betainc(a, a, np.sin(psi) ** 2), dtype=np.float64)

    def ppf(self, probability: npt.ArrayLike) -> FloatArray:
        a = self.beta_shape
        sine_squared = special.betaincinv(a, a, np.asarray(probability, dtype=np.float64))
        return np.asarray(np.arcsin(np.sqrt(sine_squared)), dtype=np.float64)

    def partial_moments(
        self, lower: FloatArray, upper: FloatArray, origin: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        nodes, weights = gauss_nodes(lower, upper)
        mass = weights * self.pdf(nodes)
        offset = nodes - np.asarray(origin)[..., None]
        return mass.sum(-1), (mass * offset).sum(-1), (mass * offset**2).sum(-1)

    def partial_cos_sin(
        self, lower: FloatArray, upper: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        # With u = sin^2(psi): cos(psi) = (1 - u)^(1/2), so the integrand is again a Beta density.
        a = self.beta_shape
        scale = special.beta(a, a + 0.5) / special.beta(a, a)
        u_lower, u_upper = np.sin(lower) ** 2, np.sin(upper) ** 2
        cosine = special.betainc(a, a + 0.5, u_upper) - special.betainc(a, a + 0.5, u_lower)
        sine = special.betainc(a + 0.5, a, u_upper) - special.betainc(a + 0.5, a, u_lower)
        return np.asarray(scale * cosine), np.asarray(scale * sine)


def analytic_density(level: int) -> AngleDensity:
    """The density of level `level` for isotropic input."""
    if level == 1:
        return UniformCircle()
    return SinPower(level)
