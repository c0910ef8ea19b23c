"""Angle densities of the recursive polar transform.

For Gaussian (or uniform-on-sphere) input the angle of level 1 is uniform on the circle [0, 2 pi),
and for level l >= 2 (PolarQuant, arXiv 2502.02617, section 3)

    f(psi) = sin^m(2 psi) / Z_l  on [0, pi/2],   m = 2^(l-1) - 1,
    sin^2(psi) ~ Beta(a, a),                     a = 2^(l-2),

so that CDF, quantiles and the integrals of cos and sin are incomplete beta functions. All integrals
take arrays of interval ends, in radians, and return float64 arrays of the same shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import special

from sphkv_codebooks.errors import CodeError

FloatArray = npt.NDArray[np.float64]

TWO_PI = 2.0 * np.pi
HALF_PI = 0.5 * np.pi
MAX_LEVEL = 16

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


@dataclass(frozen=True, eq=False)
class EmpiricalDensity(AngleDensity):
    """A piecewise constant density from a histogram of measured angles.

    counts: (n_bins,), non-negative, on equal bins of [0, 2 pi) (is_circle) or [0, pi/2].
    """

    counts: FloatArray
    is_circle: bool = False
    is_symmetric = False
    _edges: FloatArray = field(init=False, repr=False)
    _height: FloatArray = field(init=False, repr=False)
    _moments: FloatArray = field(init=False, repr=False)
    _cos_sin: FloatArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = np.array(self.counts, dtype=np.float64)
        if counts.ndim != 1 or counts.size < 2:
            raise CodeError(f"a histogram of angles needs 2 bins or more, got shape {counts.shape}")
        if not np.isfinite(counts).all() or counts.min() < 0 or counts.sum() <= 0:
            raise CodeError("a histogram of angles needs finite counts >= 0, not all of them zero")
        counts.setflags(write=False)
        # On the circle the tables cover three turns, [-2 pi, 4 pi): a cell may run over the seam.
        turns = 3 if self.is_circle else 1
        start = -TWO_PI if self.is_circle else 0.0
        width = self.upper / counts.size
        edges = np.asarray(start + width * np.arange(turns * counts.size + 1), dtype=np.float64)
        height = np.tile(counts / counts.sum() / width, turns)
        fields = {
            "counts": counts,
            "_edges": edges,
            "_height": height,
            "_moments": _cumulative(height * np.diff(_powers(edges), axis=1)),
            "_cos_sin": _cumulative(height * np.diff(_waves(edges), axis=1)),
        }
        for name, values in fields.items():
            object.__setattr__(self, name, values)

    @classmethod
    def from_samples(
        cls, angles: npt.ArrayLike, *, is_circle: bool, n_bins: int = 4096
    ) -> EmpiricalDensity:
        """The histogram of angles in radians, any shape."""
        upper = TWO_PI if is_circle else HALF_PI
        angles = np.asarray(angles).reshape(-1)
        if angles.size == 0:
            raise CodeError("an empirical density needs at least one angle, got none")
        if not np.isfinite(angles).all():
            raise CodeError("an empirical density needs finite angles; some are NaN or infinite")
        slack = 1e-5  # float32 angles may round past the end of the support
        if angles.min() < -slack or angles.max() > upper + slack:
            raise CodeError(
                f"angles of this level lie in [0, {upper:.6f}] rad, "
                f"got [{angles.min():.6f}, {angles.max():.6f}]"
            )
        bins = np.clip((angles * (n_bins / upper)).astype(np.int64), 0, n_bins - 1)
        counts = np.bincount(bins, minlength=n_bins).astype(np.float64)
        return cls(counts, is_circle)

    def _bin(self, psi: FloatArray) -> npt.NDArray[np.int64]:
        scale = self.counts.size / self.upper
        index = ((psi - self._edges[0]) * scale).astype(np.int64)
        return np.asarray(np.minimum(index, self._height.size - 1), dtype=np.int64)

    def pdf(self, psi: npt.ArrayLike) -> FloatArray:
        angle = np.asarray(psi, dtype=np.float64)
        if self.is_circle:
            angle = np.mod(angle, TWO_PI)
        inside = (angle >= 0) & (angle <= self.upper)
        return np.where(inside, self._height[self._bin(np.where(inside, angle, 0.0))], 0.0)

    def cdf(self, psi: npt.ArrayLike) -> FloatArray:
        psi = np.clip(np.asarray(psi, dtype=np.float64), 0.0, self.upper)
        mass, _, _ = self.partial_moments(np.zeros_like(psi), psi, np.zeros(()))
        return mass

    def ppf(self, probability: npt.ArrayLike) -> FloatArray:
        edges = np.linspace(0.0, self.upper, self.counts.size + 1)
        return np.asarray(np.interp(np.asarray(probability), self.cdf(edges), edges))

    def partial_moments(
        self, lower: FloatArray, upper: FloatArray, origin: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        m0, m1, m2 = self._integrals(self._moments, _powers, lower, upper)
        return m0, m1 - origin * m0, m2 - 2.0 * origin * m1 + origin**2 * m0

    def partial_cos_sin(
        self, lower: FloatArray, upper: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        cosine, sine = self._integrals(self._cos_sin, _waves, lower, upper)
        return cosine, sine

    def _integrals(
        self,
        table: FloatArray,
        antiderivatives: Callable[[FloatArray], FloatArray],
        lower: FloatArray,
        upper: FloatArray,
    ) -> FloatArray:
        """(n, ...) integrals over [lower, upper]: whole bins from the table, plus the ends."""
        ends = np.stack([lower, upper])
        index = self._bin(ends)
        inside = antiderivatives(ends) - antiderivatives(self._edges[index])
        cumulative = table[:, index] + self._height[index] * inside
        return np.asarray(cumulative[:, 1] - cumulative[:, 0])


def _cumulative(steps: FloatArray) -> FloatArray:
    return np.concatenate([np.zeros((steps.shape[0], 1)), np.cumsum(steps, axis=1)], axis=1)


def _powers(psi: FloatArray) -> FloatArray:
    """Antiderivatives of 1, psi, psi^2, stacked first."""
    square = psi * psi
    return np.stack([psi, square * 0.5, square * psi * (1.0 / 3.0)])


def _waves(psi: FloatArray) -> FloatArray:
    """Antiderivatives of cos and sin, stacked first."""
    return np.stack([np.sin(psi), -np.cos(psi)])


def analytic_density(level: int) -> AngleDensity:
    """The density of level `level` for isotropic input."""
    if level == 1:
        return UniformCircle()
    return SinPower(level)
