"""Lloyd-Max books for many histograms of one level at once.

    c_i = E[psi | cell i],   t_i = (c_i + c_(i+1)) / 2          (Lloyd 1982, Max 1960)

The same fixed point as `sphkv_codebooks.lloyd_max`, which fits one density to the last digit;
this one runs all heads of a layer in step, and is content when the angle MSE stands still. Each
histogram is a piecewise constant density, so masses and moments of a cell are exact differences of
tabulated antiderivatives. Cells of level 1 may run over the seam of the circle.
"""

import numpy as np
import numpy.typing as npt

from sphkv_codebooks.codebook import Codebook
from sphkv_codebooks.density import HALF_PI, TWO_PI, analytic_density
from sphkv_codebooks.lloyd_max import lloyd_max

FloatArray = npt.NDArray[np.float64]

MAX_ROUNDS = 400


class _Histograms:
    """Antiderivatives of (1, psi, psi^2) times each density; rows are histograms."""

    def __init__(self, counts: npt.NDArray[np.int64], is_circle: bool) -> None:
        n_bins = counts.shape[1]
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

    def cells(self, edges: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Centroids (n_rows, n_cells) and angle MSE (n_rows,) of the cells between edges."""
        index = np.clip((edges / self.width).astype(np.int64), 0, self.height.shape[1] - 1)
        height = np.take_along_axis(self.height, index, axis=1)
        inside = zip(_antiderivatives(edges), _antiderivatives(index * self.width), strict=True)
        mass, first, second = (
            np.diff(np.take_along_axis(table, index, axis=1) + height * (at - below), axis=1)
            for table, (at, below) in zip(self.tables, inside, strict=True)
        )
        middle = 0.5 * (edges[:, 1:] + edges[:, :-1])
        full = mass > 1e-12  # an empty cell keeps its middle
        centroids = np.divide(first, mass, out=middle.copy(), where=full)
        # Rounding must not push a centroid out of its cell.
        centroids = np.clip(centroids, edges[:, :-1], edges[:, 1:])
        mse = (second - 2.0 * centroids * first + centroids**2 * mass).sum(axis=1)
        return centroids, mse


def fit_books(
    counts: npt.NDArray[np.int64], level: int, n_cells: int, rtol: float = 1e-6
) -> list[Codebook]:
    """One book per histogram (n_rows, n_bins), starting from the analytic book of the level.

    Never worse than the analytic book under the histogram: no round raises the MSE.
    """
    is_circle = level == 1
    start = lloyd_max(analytic_density(level), n_cells)
    if n_cells == 1 and is_circle:
        return [start] * len(counts)  # one cell on a circle has no better centre to move to
    first = np.append(start.cell_edges()[0], start.cell_edges()[1][-1])
    edges = np.tile(first, (len(counts), 1))
    histograms = _Histograms(counts, is_circle)
    centroids, mse = histograms.cells(edges)
    for _ in range(MAX_ROUNDS):
        edges = _next_edges(edges, centroids, is_circle)
        centroids, following = histograms.cells(edges)
        change = mse - following
        mse = following
        if bool((change <= rtol * np.maximum(mse, 1e-30)).all()):
            break
    return [_book(level, e, c) for e, c in zip(edges, centroids, strict=True)]


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
