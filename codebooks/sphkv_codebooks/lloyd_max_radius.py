"""Block radii in a few bits against one float16 norm per vector.

Distortion with a quantised radius (rho^2 of mean 1): D = 1 + E rhohat^2 - 2 E[rho rhohat] G. Over
the centroids alone this is minimised by rhohat_i = G E[rho | cell i]: the thresholds stay those of
plain Lloyd-Max and every centroid shrinks by G, which is the least-squares gain of
spherical_code.py folded into the book instead of the norm. So the book here is the plain one, and
`gain` decides. At 4/2/2/2 it costs (chi limit) +.86, +3.14, +10.7 % of D for 4, 3, 2 bits, and with
centroids that absorb the gain +.06, +2.3, +9.9 %; the exact Beta law for head_dim 128, used here,
+.74, +2.7, +9.3 %, with the gain in the norm .9 to 2 % less.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from sphkv_codebooks.angle_density import FloatArray
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.lloyd_max import companding_thresholds, fixed_point
from sphkv_codebooks.radius_coding import (
    NORM_BITS,
    RadiusCoding,
    RadiusMoments,
    StoredRadii,
    present,
    to_fp16,
)
from sphkv_codebooks.radius_density import RadiusDensity


@dataclass(frozen=True, eq=False)
class LloydMaxRadius(RadiusCoding):
    """bits per block against one norm; centroids (2^bits,), thresholds (2^bits - 1,) of rho."""

    bits: int
    centroids: FloatArray
    thresholds: FloatArray
    norm_bits = NORM_BITS

    def __post_init__(self) -> None:
        _check_radius_bits(self.bits)
        for name in ("centroids", "thresholds"):
            values = np.array(getattr(self, name), dtype=np.float64)
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        n_cells = 2**self.bits
        if self.centroids.shape != (n_cells,) or self.thresholds.shape != (n_cells - 1,):
            raise CodeError(f"a {self.bits}-bit radius book has {n_cells} centroids")
        ordered = np.empty(2 * n_cells - 1)
        ordered[0::2], ordered[1::2] = self.centroids, self.thresholds
        if not np.isfinite(ordered).all() or ordered[0] < 0 or (np.diff(ordered) <= 0).any():
            raise CodeError("a radius book needs 0 <= c_0 < t_0 < c_1 < ... , all finite")

    @classmethod
    def design(cls, bits: int, block_dim: int, head_dim: int | None) -> LloydMaxRadius:
        """The Lloyd-Max book of rho for isotropic input (head_dim None: the chi limit)."""
        _check_radius_bits(bits)
        return _design(bits, block_dim, head_dim)

    @property
    def bits_per_radius(self) -> int:  # type: ignore[override]
        return self.bits

    @property
    def spec(self) -> str:
        return f"lloyd_max:{self.bits}"

    def encode(self, radii: torch.Tensor, norms: torch.Tensor) -> StoredRadii:
        """Cell i holds t_(i-1) <= rho < t_i, decided as r >= float32(t / sqrt(n_radii)) * norm.

        Exact in IEEE float32, like the angles; a zero vector passes every threshold.
        """
        scale = radii.shape[-1] ** -0.5
        codes = torch.zeros(radii.shape, dtype=torch.uint8, device=radii.device)
        for threshold in (self.thresholds * scale).astype(np.float32).tolist():
            codes += radii >= (norms * threshold)[..., None]
        return StoredRadii(codes=codes, norms=to_fp16(norms))

    def relative_radii(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """rhohat / sqrt(n_radii): radii of a vector of norm one, (..., n_radii)."""
        scale = codes.shape[-1] ** -0.5
        table = torch.as_tensor(self.centroids * scale, device=codes.device).to(dtype)
        return table[codes.long()]

    def decode(self, stored: StoredRadii, dtype: torch.dtype) -> torch.Tensor:
        relative = self.relative_radii(present(stored.codes, "radius_codes"), dtype)
        return relative * present(stored.norms, "norms").to(dtype)[..., None]

    def moments(self, block_dim: int, head_dim: int | None) -> RadiusMoments:
        """head_dim None asks for the chi limit."""
        density = RadiusDensity(block_dim, head_dim)
        edges = np.concatenate([[0.0], np.minimum(self.thresholds, density.upper), [density.upper]])
        mass, offset, square = density.partial_moments(edges[:-1], edges[1:], self.centroids)
        mean_square = float((mass * self.centroids**2).sum())
        return RadiusMoments(
            mean_square,
            mean_square + float((offset * self.centroids).sum()),
            float((square * self.centroids**2).sum()),
        )


@lru_cache(maxsize=256)
def _design(bits: int, block_dim: int, head_dim: int | None) -> LloydMaxRadius:
    density = RadiusDensity(block_dim, head_dim)
    thresholds, centroids = fixed_point(density, companding_thresholds(density, 2**bits), 1e-12)
    return LloydMaxRadius(bits, centroids, thresholds)


def _check_radius_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise CodeError(f"a Lloyd-Max radius has 1 to 8 bits, not {bits}")
