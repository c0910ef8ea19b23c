"""Lloyd-Max codebooks: the fixed point of c_i = E[psi | cell i], t_i = (c_i + c_(i+1)) / 2.

Plain Lloyd iterations need thousands of rounds at 5 bits. The fixed point is a root of
g_i(t) = t_i - (c_i(t) + c_(i+1)(t)) / 2, whose Jacobian is tridiagonal and known in closed form
(d c_i / d upper edge = f(edge) (edge - c_i) / mass_i), so Newton's method finds it in a few rounds.
A Newton step that leaves the ordered thresholds or raises the error is replaced by a Lloyd step,
which never raises it (Lloyd 1982). For log-concave densities, all the analytic ones, the optimum is
unique.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_banded

from sphkv_codebooks.codebook import MAX_CELLS, Codebook
from sphkv_codebooks.density import (
    HALF_PI,
    TWO_PI,
    AngleDensity,
    EmpiricalDensity,
    FloatArray,
    SinPower,
    UniformCircle,
)
from sphkv_codebooks.errors import CodeError

_MAX_ROUNDS = 5000


class LineDensity(Protocol):
    """What the fixed point needs of a density on an interval: AngleDensity, RadiusDensity."""

    @property
    def lower(self) -> float: ...

    @property
    def upper(self) -> float: ...

    def pdf(self, psi: npt.ArrayLike, /) -> FloatArray: ...

    def partial_moments(
        self, lower: FloatArray, upper: FloatArray, origin: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]: ...


class _Cells:
    """Masses, centroids and squared error of the cells between consecutive edges."""

    def __init__(self, density: LineDensity, edges: FloatArray) -> None:
        self.lower, self.upper = lower, upper = edges[:-1], edges[1:]
        middle = 0.5 * (lower + upper)
        self.mass, first, second = density.partial_moments(lower, upper, middle)
        full = self.mass > 1e-300
        offset = np.divide(first, self.mass, out=np.zeros_like(first), where=full)
        # An empty cell keeps its middle; rounding must not push a centroid out of its cell.
        self.centroids = np.clip(middle + offset, lower, upper)
        self.mse = float(np.maximum(second - offset * first, 0.0).sum())


def lloyd_max(
    density: AngleDensity,
    n_cells: int,
    rtol: float = 1e-12,
    *,
    level: int | None = None,
    start: Codebook | None = None,
) -> Codebook:
    """The Lloyd-Max codebook of `density` with `n_cells` cells (any number from 1 to 256).

    rtol: stop when a round changes the angle MSE by less than this, relative. start: a warm start
    with the same number of cells; the result is never worse than it under `density`. Level 1 of
    isotropic data is closed form: equal arcs from 0.
    """
    if not 1 <= n_cells <= MAX_CELLS:
        raise CodeError(f"a codebook has 1 to {MAX_CELLS} cells, not {n_cells}")
    if start is not None and (start.n_cells != n_cells or start.is_circle != density.is_circle):
        raise CodeError(
            f"the warm start has {start.n_cells} cells of level {start.level}; it must match"
        )
    if isinstance(density, UniformCircle):
        arc = TWO_PI / n_cells
        steps = np.arange(n_cells)
        return Codebook(1, np.asarray((steps + 0.5) * arc), np.asarray(steps * arc), True)
    if density.is_circle:
        return _lloyd_circle(density, n_cells, rtol, start)
    if isinstance(density, SinPower):
        level = density.level
    if level is None or level < 2:
        raise CodeError("say which level (2 or more) an empirical density on [0, pi/2] is for")
    thresholds = start.thresholds if start else companding_thresholds(density, n_cells)
    thresholds, centroids = fixed_point(density, np.array(thresholds), rtol)
    if density.is_symmetric:
        thresholds = 0.5 * (thresholds + (HALF_PI - thresholds[::-1]))
        centroids = 0.5 * (centroids + (HALF_PI - centroids[::-1]))
    return Codebook(level, centroids, thresholds, is_circle=False)


def companding_thresholds(density: LineDensity, n_cells: int) -> FloatArray:
    """Quantiles of f^(1/3): optimal for many cells (Panter and Dite 1951), a good start for few."""
    edges = np.linspace(density.lower, density.upper, 4097)
    weight = np.cbrt(density.pdf(0.5 * (edges[:-1] + edges[1:]))) + 1e-9
    cumulative = np.concatenate([[0.0], np.cumsum(weight)])
    quantiles = np.arange(1, n_cells) / n_cells
    return np.asarray(np.interp(quantiles, cumulative / cumulative[-1], edges))


def fixed_point(
    density: LineDensity, thresholds: FloatArray, rtol: float
) -> tuple[FloatArray, FloatArray]:
    """Thresholds (n_cells - 1,) and centroids (n_cells,) of the Lloyd-Max fixed point."""
    ends = (np.array([density.lower]), np.array([density.upper]))

    def cells_of(inner: FloatArray) -> _Cells:
        return _Cells(density, np.concatenate([ends[0], inner, ends[1]]))

    cells = cells_of(thresholds)
    if thresholds.size == 0:
        return thresholds, cells.centroids
    for _ in range(_MAX_ROUNDS):
        candidate = _newton_step(density, thresholds, cells)
        following = cells_of(candidate) if candidate is not None else None
        if candidate is None or following is None or following.mse > cells.mse * (1 + 1e-13):
            candidate = 0.5 * (cells.centroids[:-1] + cells.centroids[1:])
            following = cells_of(candidate)
        change = abs(following.mse - cells.mse)
        moved = float(np.abs(candidate - thresholds).max())
        thresholds, cells = candidate, following
        # Near the optimum the MSE is flat to second order: also ask that thresholds stand still,
        # or, for a coarse rtol (empirical books), be content with the MSE.
        if change <= rtol * max(cells.mse, 1e-300) and (moved < 1e-9 or rtol > 1e-10):
            break
    return thresholds, cells.centroids


def _newton_step(density: LineDensity, thresholds: FloatArray, cells: _Cells) -> FloatArray | None:
    """The next thresholds by Newton's method, or None where the step is not admissible."""
    if cells.mass.min() <= 1e-12:
        return None
    if isinstance(density, EmpiricalDensity):
        # A histogram's height in one bin is noise: take the mean over part of the cells around.
        reach = 0.25 * np.minimum(thresholds - cells.lower[:-1], cells.upper[1:] - thresholds)
        mass, _, _ = density.partial_moments(thresholds - reach, thresholds + reach, thresholds)
        height = mass / (2.0 * reach)
    else:
        height = density.pdf(thresholds)
    by_upper = height * (thresholds - cells.centroids[:-1]) / cells.mass[:-1]
    by_lower = height * (cells.centroids[1:] - thresholds) / cells.mass[1:]
    banded = np.zeros((3, thresholds.size))
    banded[1] = 1.0 - 0.5 * (by_upper + by_lower)
    banded[0, 1:] = -0.5 * by_upper[1:]
    banded[2, :-1] = -0.5 * by_lower[:-1]
    residual = thresholds - 0.5 * (cells.centroids[:-1] + cells.centroids[1:])
    try:
        step = solve_banded((1, 1), banded, residual)
    except (np.linalg.LinAlgError, ValueError):
        return None
    candidate = thresholds - step
    ordered = np.concatenate([[density.lower], candidate, [density.upper]])
    return candidate if (np.diff(ordered) > 0).all() else None


def _lloyd_circle(
    density: AngleDensity, n_cells: int, rtol: float, start: Codebook | None
) -> Codebook:
    """Lloyd's iteration on the circle: cells wrap, distances go the short way round."""
    first = start or lloyd_max(UniformCircle(), n_cells)
    edges = np.append(first.thresholds, first.thresholds[0] + TWO_PI)
    cells = _Cells(density, edges)
    for _ in range(_MAX_ROUNDS):
        centroids = cells.centroids
        inner = 0.5 * (centroids[:-1] + centroids[1:])
        seam = 0.5 * (centroids[-1] - TWO_PI + centroids[0]) if n_cells > 1 else edges[0]
        # Keep the first edge in one turn around [0, 2 pi): densities are tabulated for three.
        edges = np.concatenate([[seam], inner, [seam + TWO_PI]])
        edges -= TWO_PI * np.floor(edges[0] / TWO_PI)
        following = _Cells(density, edges)
        change = abs(cells.mse - following.mse)
        cells = following
        if change <= rtol * max(cells.mse, 1e-300):
            break
    thresholds = np.mod(edges[:-1], TWO_PI)
    order = np.argsort(thresholds, kind="stable")
    return Codebook(1, np.mod(cells.centroids, TWO_PI)[order], thresholds[order], is_circle=True)
