"""The density of measured angles: piecewise constant, from a histogram.

Integrals of 1, psi, psi^2, cos and sin over an interval are differences of antiderivatives: whole
bins from a table of cumulative sums, the two ends in closed form. Exact for the histogram.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sphkv_codebooks.angle_density import HALF_PI, TWO_PI, AngleDensity, FloatArray
from sphkv_codebooks.errors import CodeError


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
