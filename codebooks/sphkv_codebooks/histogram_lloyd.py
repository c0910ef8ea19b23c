"""Empirical Lloyd-Max books: many histograms of measured angles at once, in milliseconds.

    c_i = E[psi | cell i],   t_i = (c_i + c_(i+1)) / 2          (Lloyd 1982, Max 1960)

The fixed point of `lloyd_max`, which takes one density to the last digit; this takes all heads of a
layer in step and is content when the angle MSE stands still. A histogram is a piecewise constant
density, so masses and moments of a cell are exact differences of tabulated antiderivatives. Cells
of level 1 may run over the seam of the circle.

Every row starts from the analytic book of the level (so that it is never worse than that book on
its own histogram) and from a second place, because data far from the analytic density leave cells
empty, never to move; the better is kept. Steps are stretched while that lowers the error, by up to
1.9 times Lloyd's, and are Lloyd's own, which never raise it, where it does not. Ours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sphkv_codebooks.angle_density import HALF_PI, TWO_PI, FloatArray
from sphkv_codebooks.codebook import Codebook
from sphkv_codebooks.density import analytic_density
from sphkv_codebooks.empirical_density import EmpiricalDensity
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.lloyd_max import lloyd_max

MAX_ROUNDS = 1000
_LONGEST_STEP = 1.9
_GROWTH = 1.25


def lloyd_max_samples(
    angles: npt.ArrayLike,
    level: int,
    n_cells: int,
    *,
    rtol: float = 1e-6,
    n_bins: int = 4096,
    start: Codebook | None = None,
) -> Codebook:
    """The empirical Lloyd-Max codebook of measured angles (radians, any shape) of one level.

    start: a book of as many cells to start from in place of the analytic one.
    """
    density = EmpiricalDensity.from_samples(angles, is_circle=level == 1, n_bins=n_bins)
    return fit_books(density.counts[None], level, n_cells, rtol, start=start)[0]


def fit_books(
    counts: npt.NDArray[np.integer] | FloatArray,
    level: int,
    n_cells: int,
    rtol: float = 1e-6,
    *,
    start: Codebook | None = None,
) -> list[Codebook]:
    """One book per histogram: counts (n_rows, n_bins) on equal bins of the level's range.

    rtol: stop when a round lowers the angle MSE by less than this, relative. Under its histogram a
    book is never worse than `start`, by default the analytic book of the level.

    Raises:
        CodeError: a histogram without counts, or a start of another level or size.
    """
    counts = np.asarray(counts, dtype=np.float64)
    if counts.ndim != 2 or not np.isfinite(counts).all() or (counts < 0).any():
        raise CodeError(f"histograms are (n_rows, n_bins) counts >= 0, got shape {counts.shape}")
    if (counts.sum(axis=1) <= 0).any():
        raise CodeError("a histogram of angles has no counts at all")
    start = start or lloyd_max(analytic_density(level), n_cells)
    if start.n_cells != n_cells or start.level != level:
        raise CodeError(
            f"the start has {start.n_cells} cells of level {start.level}, wanted {n_cells} of "
            f"level {level}"
        )
    is_circle = level == 1
    if n_cells == 1 and is_circle:
        return [start] * len(counts)  # one cell on a circle has no better centre to move to
    first = np.append(start.cell_edges()[0], start.cell_edges()[1][-1])
    starts = (np.tile(first, (len(counts), 1)), _spread_edges(counts, first, is_circle))
    histograms = _Histograms(np.concatenate([counts, counts]), is_circle)
    edges, centroids, mse = _descend(histograms, np.concatenate(starts), rtol)
    n_rows = len(counts)
    better = np.arange(n_rows) + n_rows * (mse[n_rows:] < mse[:n_rows])
    return [_book(level, edges[row], centroids[row]) for row in better]


class _Histograms:
    """Antiderivatives of (1, psi, psi^2) times each density; rows are histograms."""

    def __init__(self, counts: FloatArray, is_circle: bool) -> None:
        n_bins = counts.shape[1]
        self.is_circle = is_circle
        self.width = (TWO_PI if is_circle else HALF_PI) / n_bins
        height = counts / counts.sum(axis=1, keepdims=True) / self.width
        if is_circle:  # two turns: the last cell starts in the first and may end in the second
            height = np.tile(height, 2)
        edges = self.width * np.arange(height.shape[1] + 1)
        self.tables = [
            np.concatenate(
                [np.zeros((len(counts), 1)), np.cumsum(height * np.diff(power), axis=1)], axis=1
            )
            for power in _antiderivatives(edges)
        ]
        self.height = height

    def cells(
        self, rows: npt.NDArray[np.int64], edges: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Centroids (n, n_cells) and angle MSE (n,) of the cells between edges, for some rows."""
        index = np.clip((edges / self.width).astype(np.int64), 0, self.height.shape[1] - 1)
        place = rows[:, None], index
        height = self.height[place]
        inside = zip(_antiderivatives(edges), _antiderivatives(index * self.width), strict=True)
        mass, first, second = (
            np.diff(table[place] + height * (at - below), axis=1)
            for table, (at, below) in zip(self.tables, inside, strict=True)
        )
        middle = 0.5 * (edges[:, 1:] + edges[:, :-1])
        full = mass > 1e-12  # an empty cell keeps its middle
        centroids = np.divide(first, mass, out=middle.copy(), where=full)
        # Rounding must not push a centroid out of its cell.
        centroids = np.clip(centroids, edges[:, :-1], edges[:, 1:])
        mse = (second - 2.0 * centroids * first + centroids**2 * mass).sum(axis=1)
        return centroids, mse


def _descend(
    histograms: _Histograms, edges: FloatArray, rtol: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Edges, centroids and MSE of every row where no round lowers the MSE any more."""
    active = np.arange(len(edges))
    edges = edges.copy()
    centroids, mse = histograms.cells(active, edges)
    stretch = np.ones(len(edges))
    for _ in range(MAX_ROUNDS):
        lloyd = _next_edges(edges[active], centroids[active], histograms.is_circle)
        step = stretch[active]
        moved, moved_centroids, moved_mse = _stretched(
            histograms, active, edges[active], lloyd, step
        )
        worse = moved_mse > mse[active]
        if worse.any():
            rows = active[worse]
            moved[worse] = lloyd[worse]
            moved_centroids[worse], moved_mse[worse] = histograms.cells(rows, lloyd[worse])
        stretch[active] = np.where(worse, 1.0, np.minimum(step * _GROWTH, _LONGEST_STEP))
        change = mse[active] - moved_mse
        edges[active], centroids[active], mse[active] = moved, moved_centroids, moved_mse
        active = active[change > rtol * np.maximum(moved_mse, 1e-30)]
        if active.size == 0:
            break
    return edges, centroids, mse


def _stretched(
    histograms: _Histograms,
    rows: npt.NDArray[np.int64],
    edges: FloatArray,
    lloyd: FloatArray,
    step: FloatArray,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Edges moved `step` times as far as Lloyd's, their centroids and MSE; Lloyd's own where the
    cells would cross or a circle's first edge has been taken to another turn.
    """
    moved = edges + step[:, None] * (lloyd - edges)
    crossed = (np.diff(moved, axis=1) <= 0).any(axis=1)
    if histograms.is_circle:
        # Nothing may leave the two turns that are tabulated.
        crossed |= (moved[:, 0] < 0) | (moved[:, 0] >= TWO_PI)
        crossed |= np.abs(lloyd[:, 0] - edges[:, 0]) > np.pi
        moved[:, -1] = moved[:, 0] + TWO_PI
        crossed |= moved[:, -2] >= moved[:, -1]
    moved[crossed] = lloyd[crossed]
    return moved, *histograms.cells(rows, moved)


def _spread_edges(counts: FloatArray, first: FloatArray, is_circle: bool) -> FloatArray:
    """The second start: half an arc further on the circle, else quantiles of f^(1/3)."""
    n_cells = first.size - 1
    if is_circle:
        # Clusters that sit on the thresholds hold them there.
        turned = first + np.pi / n_cells
        turned -= TWO_PI * np.floor(turned[0] / TWO_PI)
        return np.tile(turned, (len(counts), 1))
    weight = np.cbrt(counts / counts.sum(axis=1, keepdims=True)) + 1e-9
    cumulative = np.concatenate([np.zeros((len(counts), 1)), np.cumsum(weight, axis=1)], axis=1)
    grid = np.linspace(0.0, HALF_PI, counts.shape[1] + 1)
    quantiles = np.arange(n_cells + 1) / n_cells
    return np.stack([np.interp(quantiles, row / row[-1], grid) for row in cumulative])


def _antiderivatives(psi: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    return psi, psi**2 / 2, psi**3 / 3


def _next_edges(edges: FloatArray, centroids: FloatArray, is_circle: bool) -> FloatArray:
    """Thresholds half way between centroids; the ends stay, or on the circle wrap."""
    inner = 0.5 * (centroids[:, 1:] + centroids[:, :-1])
    if not is_circle:
        return np.concatenate([edges[:, :1], inner, edges[:, -1:]], axis=1)
    seam = 0.5 * (centroids[:, -1:] - TWO_PI + centroids[:, :1])
    moved = np.concatenate([seam, inner, seam + TWO_PI], axis=1)
    return np.asarray(moved - TWO_PI * np.floor(seam / TWO_PI))


def _book(level: int, edges: FloatArray, centroids: FloatArray) -> Codebook:
    if level > 1:
        return Codebook(level, centroids, edges[1:-1], is_circle=False)
    thresholds = np.mod(edges[:-1], TWO_PI)
    order = np.argsort(thresholds, kind="stable")
    return Codebook(level, np.mod(centroids, TWO_PI)[order], thresholds[order], is_circle=True)
