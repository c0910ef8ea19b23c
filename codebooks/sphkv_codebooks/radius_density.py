"""The density of a block radius relative to its vector's norm, for isotropic input.

A vector of head_dim coordinates has n = head_dim / block_dim blocks. With rho = r_block sqrt(n) /
||x||, so that E rho^2 = 1,

    rho^2 / n ~ Beta(block_dim / 2, (head_dim - block_dim) / 2),

independent of ||x||. As head_dim grows rho^2 tends to chi^2 / block_dim with block_dim degrees of
freedom; `head_dim = None` asks for that limit. (Ours; the Beta law is the ratio of chi-squares.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from sphkv_codebooks.density import FloatArray
from sphkv_codebooks.errors import CodeError


@dataclass(frozen=True)
class RadiusDensity:
    """block_dim: coordinates under one radius; head_dim: of the vector, or None for the limit."""

    block_dim: int
    head_dim: int | None = None

    def __post_init__(self) -> None:
        if self.block_dim < 2 or (self.head_dim is not None and self.head_dim <= self.block_dim):
            raise CodeError(
                f"a block of {self.block_dim} coordinates in a vector of {self.head_dim} has no "
                "radius of its own: at full depth the radius is the norm"
            )

    @property
    def _scale(self) -> float:
        """rho^2 = scale * u, with u Beta or Gamma distributed."""
        if self.head_dim is None:
            return 2.0 / self.block_dim
        return self.head_dim / self.block_dim

    @property
    def _shapes(self) -> tuple[float, float]:
        assert self.head_dim is not None
        return self.block_dim / 2, (self.head_dim - self.block_dim) / 2

    @property
    def _last_u(self) -> float:
        return np.inf if self.head_dim is None else 1.0

    def _cumulative(self, u: FloatArray, extra: float) -> FloatArray:
        """E[u^extra; u' <= u], the partial moment of order `extra`."""
        if self.head_dim is None:
            a = self.block_dim / 2
            weight = np.exp(special.gammaln(a + extra) - special.gammaln(a))
            return np.asarray(weight * special.gammainc(a + extra, u))
        a, b = self._shapes
        weight = special.beta(a + extra, b) / special.beta(a, b)
        return np.asarray(weight * special.betainc(a + extra, b, u))

    @property
    def lower(self) -> float:
        return 0.0

    @property
    def upper(self) -> float:
        """End of the support; for the limit the quantile beyond which 1e-30 is left."""
        if self.head_dim is None:
            u = float(special.gammainccinv(self.block_dim / 2, 1e-30))
            return float(np.sqrt(self._scale * u))
        return float(np.sqrt(self._scale))

    def pdf(self, rho: npt.ArrayLike) -> FloatArray:
        rho = np.asarray(rho, dtype=np.float64)
        u = rho**2 / self._scale
        jacobian = 2.0 * rho / self._scale
        if self.head_dim is None:
            a = self.block_dim / 2
            return np.asarray(jacobian * np.exp((a - 1) * np.log(u) - u - special.gammaln(a)))
        a, b = self._shapes
        return np.asarray(
            jacobian * u ** (a - 1) * np.maximum(1 - u, 0.0) ** (b - 1) / special.beta(a, b)
        )

    def moment(self, order: float) -> float:
        """E rho^order."""
        if self.head_dim is None:
            a = self.block_dim / 2
            mean = np.exp(special.gammaln(a + order / 2) - special.gammaln(a))
        else:
            a, b = self._shapes
            mean = special.beta(a + order / 2, b) / special.beta(a, b)
        return float(self._scale ** (order / 2) * mean)

    def partial_moments(
        self, lower: FloatArray, upper: FloatArray, origin: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Integrals of (1, rho - origin, (rho - origin)^2) f over each [lower, upper]."""
        # The square of the support's end may round past 1, where the incomplete beta is NaN.
        u_lower = np.minimum(lower**2 / self._scale, self._last_u)
        u_upper = np.minimum(upper**2 / self._scale, self._last_u)
        m0, m1, m2 = (
            self._scale ** (order / 2)
            * (self._cumulative(u_upper, order / 2) - self._cumulative(u_lower, order / 2))
            for order in (0, 1, 2)
        )
        return m0, m1 - origin * m0, m2 - 2 * origin * m1 + origin**2 * m0
