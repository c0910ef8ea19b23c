"""The codebook of one level: centroids and the thresholds between their cells.

Cells are half open, closed below: an angle on a threshold belongs to the cell above it.
Levels >= 2 have n_cells - 1 thresholds; cell i is [threshold[i-1], threshold[i]) within [0, pi/2].
Level 1 is a circle with n_cells thresholds in [0, 2 pi); cell i is [threshold[i], threshold[i+1]),
and the last cell runs over the seam to threshold[0].

Lloyd-Max: S. Lloyd, "Least squares quantization in PCM" (1982); J. Max (1960).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sphkv_codebooks.density import HALF_PI, TWO_PI, AngleDensity, FloatArray
from sphkv_codebooks.errors import CodeError

MAX_CELLS = 256


@dataclass(frozen=True, eq=False)
class Codebook:
    """centroids: (n_cells,), thresholds: (n_cells,) on the circle, else (n_cells - 1,); radians."""

    level: int
    centroids: FloatArray
    thresholds: FloatArray
    is_circle: bool

    def __post_init__(self) -> None:
        for name in ("centroids", "thresholds"):
            values = np.array(getattr(self, name), dtype=np.float64)
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        n_cells = self.centroids.size
        where = f"the codebook of level {self.level}"
        if self.level < 1 or self.is_circle != (self.level == 1):
            raise CodeError(f"{where}: level 1 is the circle and the only one")
        if self.centroids.ndim != 1 or not 1 <= n_cells <= MAX_CELLS:
            raise CodeError(f"{where} needs 1 to {MAX_CELLS} centroids, got {n_cells}")
        n_thresholds = n_cells if self.is_circle else n_cells - 1
        if self.thresholds.shape != (n_thresholds,):
            raise CodeError(
                f"{where} with {n_cells} cells needs {n_thresholds} thresholds, "
                f"got {self.thresholds.size}"
            )
        if not (np.isfinite(self.centroids).all() and np.isfinite(self.thresholds).all()):
            raise CodeError(f"{where} has NaN or infinite entries")
        upper = TWO_PI if self.is_circle else HALF_PI
        for values in (self.centroids, self.thresholds):
            if values.size and (values.min() < 0 or values.max() > upper):
                raise CodeError(f"{where} lies in [0, {upper:.6f}] rad; entries fall outside")
        if (np.diff(self.thresholds) <= 0).any():
            raise CodeError(f"{where}: thresholds must increase strictly")
        lower, higher = self.cell_edges()
        centre = self.unwrapped_centroids()
        if (centre < lower - 1e-12).any() or (centre > higher + 1e-12).any():
            raise CodeError(f"{where}: every centroid must lie inside its own cell")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Codebook):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[int, bytes, bytes]:
        return self.level, self.centroids.tobytes(), self.thresholds.tobytes()

    @property
    def n_cells(self) -> int:
        return int(self.centroids.size)

    @property
    def bits(self) -> float:
        """log2(n_cells); fractional when n_cells is no power of two."""
        return float(np.log2(self.n_cells))

    def cell_edges(self) -> tuple[FloatArray, FloatArray]:
        """Lower and upper end of each cell, (n_cells,); on the circle the last may pass 2 pi."""
        if self.is_circle:
            upper = np.append(self.thresholds[1:], self.thresholds[0] + TWO_PI)
            return self.thresholds, upper
        edges = np.concatenate([[0.0], self.thresholds, [HALF_PI]])
        return edges[:-1], edges[1:]

    def unwrapped_centroids(self) -> FloatArray:
        """Centroids moved by 2 pi where needed, so that each lies between its cell's edges."""
        if not self.is_circle:
            return self.centroids
        lower = self.cell_edges()[0]
        return np.where(self.centroids < lower - 1e-12, self.centroids + TWO_PI, self.centroids)

    @property
    def max_cell_radius(self) -> float:
        """Delta_l: the largest distance from a point of a cell to its centroid, radians."""
        lower, upper = self.cell_edges()
        centre = self.unwrapped_centroids()
        return float(max((centre - lower).max(), (upper - centre).max()))

    def angle_mse_rad2(self, density: AngleDensity) -> float:
        """E (psi - psihat)^2 under `density`, rad^2; on the circle the distance goes round."""
        lower, upper = self.cell_edges()
        _, _, second = density.partial_moments(lower, upper, self.unwrapped_centroids())
        return float(second.sum())

    def self_gain(self, density: AngleDensity) -> float:
        """E cos(psi - psihat) under `density`."""
        cosine, sine = density.partial_cos_sin(*self.cell_edges())
        return float((np.cos(self.centroids) * cosine + np.sin(self.centroids) * sine).sum())

    def cos_sin(self) -> tuple[FloatArray, FloatArray]:
        """cos and sin of the centroids; exact mirror images where the book is symmetric.

        A kernel that reads sin(psi_i) from cos(psi_(n-1-i)) then sees the very same numbers.
        """
        cosine, sine = np.cos(self.centroids), np.sin(self.centroids)
        mirrored = HALF_PI - self.centroids[::-1]
        if not self.is_circle and np.abs(self.centroids - mirrored).max() < 1e-12:
            sine = cosine[::-1]
        return cosine, sine

    def encode(self, angles: torch.Tensor) -> torch.Tensor:
        """Codes (same shape, uint8) of angles in radians, in [0, 2 pi) or [0, pi/2].

        For measurement. `encoder.encode_pairs` defines the codes that are stored; the two may
        differ where an angle lies within rounding of a threshold.
        """
        thresholds = torch.tensor(
            self.thresholds.tolist(), dtype=torch.float64, device=angles.device
        ).to(angles.dtype)
        code = torch.bucketize(angles.contiguous(), thresholds, right=True)
        if self.is_circle:
            code = (code - 1).remainder(self.n_cells)
        return code.to(torch.uint8)

    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Angles in radians of codes below n_cells."""
        table = torch.tensor(self.centroids.tolist(), dtype=torch.float64, device=codes.device).to(
            dtype
        )
        return table[codes.long()]
