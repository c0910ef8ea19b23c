"""Books of many histograms at once: as good as one at a time, never worse than analytic ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_codebooks.codebook import Codebook
from sphkv_codebooks.density import EmpiricalDensity, analytic_density
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.histogram_lloyd import fit_books
from sphkv_codebooks.lloyd_max import lloyd_max


def histograms(level: int, n_rows: int, n_bins: int = 512, seed: int = 1) -> np.ndarray:
    """Samples of the analytic density, tilted a little more in every row."""
    rng = np.random.default_rng(seed)
    density = analytic_density(level)
    edges = np.linspace(0.0, density.upper, n_bins + 1)
    middles = 0.5 * (edges[1:] + edges[:-1])
    rows = []
    for row in range(n_rows):
        weight = np.diff(density.cdf(edges)) * np.exp(0.4 * row * np.cos(middles))
        rows.append(rng.multinomial(20000, weight / weight.sum()))
    return np.array(rows)


@pytest.mark.parametrize("level", [1, 2, 4])
@pytest.mark.parametrize("n_cells", [2, 4, 8])
def test_as_good_as_one_density_at_a_time(level: int, n_cells: int) -> None:
    counts = histograms(level, 3)
    start = lloyd_max(analytic_density(level), n_cells)
    for row, book in zip(counts, fit_books(counts, level, n_cells, rtol=1e-7), strict=True):
        density = EmpiricalDensity(row.astype(float), is_circle=level == 1)
        alone = lloyd_max(density, n_cells, 1e-7, level=level, start=start)
        # Both stand at a fixed point; histograms of samples have several close by, and two starts
        # find the better of two.
        assert book.angle_mse_rad2(density) <= alone.angle_mse_rad2(density) * (1 + 1e-4)
        assert (book.level, book.n_cells, book.is_circle) == (level, n_cells, level == 1)


@settings(max_examples=60, deadline=None)
@given(
    level=st.sampled_from([1, 2, 3, 5]),
    n_cells=st.sampled_from([1, 2, 3, 8, 17]),
    counts=st.lists(st.integers(0, 50), min_size=24, max_size=64).filter(any),
)
def test_never_worse_than_the_analytic_book_on_its_own_data(
    level: int, n_cells: int, counts: list[int]
) -> None:
    row = np.array([counts])
    density = EmpiricalDensity(row[0].astype(float), is_circle=level == 1)
    analytic = lloyd_max(analytic_density(level), n_cells)
    fitted = fit_books(row, level, n_cells)[0]
    # Rounding of the tabulated moments only.
    assert fitted.angle_mse_rad2(density) <= analytic.angle_mse_rad2(density) * (1 + 1e-9) + 1e-12


def test_cells_run_over_the_seam_of_the_circle() -> None:
    n_bins = 256
    middles = (np.arange(n_bins) + 0.5) * 2 * np.pi / n_bins
    # Four clusters, one of them across 0, where the first cell of the analytic book begins.
    centres = np.arange(4) * np.pi / 2 - 0.1
    counts = sum(np.round(1000 * np.exp(20 * (np.cos(middles - c) - 1))) for c in centres)
    book = fit_books(np.asarray(counts, dtype=np.int64)[None], 1, 4, rtol=1e-12)[0]
    distance = np.abs(np.angle(np.exp(1j * (book.centroids[:, None] - centres))))
    assert distance.min(axis=0).max() < 0.01


@pytest.mark.parametrize("level", [2, 3, 5])
@pytest.mark.parametrize("n_cells", [3, 8, 32])
def test_reaches_the_optimum_of_the_analytic_density(level: int, n_cells: int) -> None:
    """A histogram of exact masses: the optimum is known from the density itself."""
    density = analytic_density(level)
    edges = np.linspace(0.0, density.upper, 4097)
    row = np.diff(density.cdf(edges))[None]
    exact = lloyd_max(density, n_cells)
    uneven = Codebook(
        level, exact.centroids * 0.9, 0.9 * exact.thresholds, is_circle=False
    )  # a start that is off by a tenth everywhere
    book = fit_books(row, level, n_cells, rtol=1e-9, start=uneven)[0]
    mse = exact.angle_mse_rad2(density)
    assert book.angle_mse_rad2(density) == pytest.approx(mse, rel=1e-4)
    assert uneven.angle_mse_rad2(density) > 1.05 * mse


def test_histograms_without_counts_and_foreign_starts_are_refused() -> None:
    with pytest.raises(CodeError, match="no counts"):
        fit_books(np.zeros((2, 16)), 2, 4)
    with pytest.raises(CodeError, match="n_rows, n_bins"):
        fit_books(np.ones(16), 2, 4)
    with pytest.raises(CodeError, match="the start has 8 cells"):
        fit_books(np.ones((1, 16)), 2, 4, start=lloyd_max(analytic_density(2), 8))
