"""Lloyd-Max books against published tables, an outside k-means and the optimality conditions."""

from __future__ import annotations

import kmeans1d
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_codebooks.codebook import Codebook
from sphkv_codebooks.density import (
    HALF_PI,
    TWO_PI,
    EmpiricalDensity,
    SinPower,
    UniformCircle,
    analytic_density,
)
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.histogram_lloyd import lloyd_max_samples
from sphkv_codebooks.lloyd_max import lloyd_max

# Angle MSE in rad^2 of levels 1..7 at 1..5 bits.
ANGLE_MSE = {
    1: [0.822467, 0.205617, 0.0514042, 0.0128510, 0.00321276],
    2: [0.0353982, 0.00990924, 0.00263634, 0.000681041, 0.000173151],
    3: [0.0204645, 0.00616180, 0.00171953, 0.000456921, 0.000117993],
    4: [0.0108575, 0.00339337, 0.000972946, 0.000263099, 6.86496e-5],
    5: [0.00556321, 0.00176958, 0.000514096, 0.000140246, 3.67910e-5],
    6: [0.00281160, 0.000901809, 0.000263631, 7.2219e-5, 1.89936e-5],
    7: [0.00141280, 0.000454976, 0.000133405, 3.6618e-5, 9.64209e-6],
}
TWO_BIT_CENTROIDS = {
    2: [0.309756, 0.633980, 0.936816, 1.261040],
    3: [0.426250, 0.674385, 0.896411, 1.144547],
    4: [0.524214, 0.705909, 0.864887, 1.046582],
}


@pytest.mark.parametrize("level", ANGLE_MSE)
def test_angle_mse_equals_the_table(level: int) -> None:
    density = analytic_density(level)
    for bits, expected in enumerate(ANGLE_MSE[level], start=1):
        mse = lloyd_max(density, 2**bits).angle_mse_rad2(density)
        assert mse == pytest.approx(expected, rel=1e-5), bits


@pytest.mark.parametrize("level", TWO_BIT_CENTROIDS)
def test_two_bit_centroids_equal_the_table(level: int) -> None:
    book = lloyd_max(analytic_density(level), 4)
    np.testing.assert_allclose(book.centroids, TWO_BIT_CENTROIDS[level], atol=6e-7)


def test_uniform_density_at_two_bits() -> None:
    """A uniform density on [0, 1] has the centroids 1/8, 3/8, 5/8, 7/8, on line and circle."""
    flat = EmpiricalDensity(np.ones(4096))
    book = lloyd_max(flat, 4, level=2)
    np.testing.assert_allclose(book.centroids / HALF_PI, [1 / 8, 3 / 8, 5 / 8, 7 / 8], atol=1e-10)
    circle = lloyd_max(UniformCircle(), 4)
    np.testing.assert_allclose(circle.centroids / TWO_PI, [1 / 8, 3 / 8, 5 / 8, 7 / 8], atol=1e-15)


@given(st.integers(2, 8), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_book_meets_both_optimality_conditions(level: int, n_cells: int) -> None:
    """Thresholds halve the way between centroids; centroids are the means of their cells."""
    density = SinPower(level)
    book = lloyd_max(density, n_cells)
    middles = 0.5 * (book.centroids[1:] + book.centroids[:-1])
    np.testing.assert_allclose(book.thresholds, middles, atol=1e-9)
    lower, upper = book.cell_edges()
    _, offset, _ = density.partial_moments(lower, upper, book.centroids)
    np.testing.assert_allclose(offset, 0.0, atol=1e-10)
    # The analytic densities are symmetric about pi/4, so are their books.
    np.testing.assert_allclose(book.centroids, HALF_PI - book.centroids[::-1], atol=1e-14)
    cosine, sine = book.cos_sin()
    assert (sine == cosine[::-1]).all()


@given(st.integers(1, 8), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_more_cells_never_hurt(level: int, n_cells: int) -> None:
    density = analytic_density(level)
    few, more = lloyd_max(density, n_cells), lloyd_max(density, n_cells + 1)
    assert more.angle_mse_rad2(density) < few.angle_mse_rad2(density)
    assert more.bits > few.bits


@pytest.mark.parametrize("n_cells", [2, 3, 5, 8, 16])
def test_samples_agree_with_optimal_kmeans(n_cells: int) -> None:
    """kmeans1d finds the global optimum of the sample; local optima and bins may lose 1e-3."""
    sample = SinPower(3).ppf(np.random.default_rng(5).random(60_000))
    labels, centres = kmeans1d.cluster(sample, n_cells)
    best = float(np.mean((sample - np.asarray(centres)[labels]) ** 2))
    book = lloyd_max_samples(sample, 3, n_cells, rtol=1e-9)
    assert np.mean(distance(book, sample) ** 2) <= best * (1 + 1e-3)
    assert np.mean(distance(book, sample) ** 2) >= best * (1 - 1e-12)


def distance(book: Codebook, angles: np.ndarray) -> np.ndarray:
    """|angle - decoded angle|, the short way round on the circle."""
    decoded = book.decode(book.encode(torch.from_numpy(angles)), torch.float64).numpy()
    gap = np.abs(angles - decoded)
    return np.minimum(gap, TWO_PI - gap) if book.is_circle else gap


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 33), st.booleans())
@settings(max_examples=60, deadline=None)
def test_empirical_book_is_never_worse_than_analytic_on_its_data(
    seed: int, level: int, n_cells: int, is_isotropic: bool
) -> None:
    rng = np.random.default_rng(seed)
    if is_isotropic:
        angles = analytic_density(level).ppf(rng.random(3000))
    else:
        upper = TWO_PI if level == 1 else HALF_PI
        spread = np.abs(rng.normal(rng.uniform(0.1, 0.9), 0.1, 3000)) * upper
        angles = np.mod(spread, TWO_PI) if level == 1 else np.clip(spread, 0, upper)
    density = EmpiricalDensity.from_samples(angles, is_circle=level == 1)
    analytic = lloyd_max(analytic_density(level), n_cells)
    empirical = lloyd_max_samples(angles, level, n_cells)
    assert empirical.angle_mse_rad2(density) <= analytic.angle_mse_rad2(density) * (1 + 1e-9)


def test_empirical_books_gain_on_uneven_data() -> None:
    """The law above would hold for a fit that returned its start; this one must move."""
    angles = np.random.default_rng(3).normal(0.35, 0.05, 4000)
    analytic = lloyd_max(SinPower(2), 4)
    empirical = lloyd_max_samples(angles, 2, 4)
    ratio = np.mean(distance(empirical, angles) ** 2) / np.mean(distance(analytic, angles) ** 2)
    assert ratio < 0.2


@pytest.mark.parametrize("shift", [0.0, 0.4, 3.0, 6.0])
@pytest.mark.parametrize("n_cells", [3, 4, 16])
def test_circle_is_a_circle(shift: float, n_cells: int) -> None:
    """Rotating the data rotates the book: the seam at 0 = 2 pi is no place of its own."""
    rng = np.random.default_rng(11)
    clusters = rng.integers(0, n_cells, 8000) * (TWO_PI / n_cells)
    angles = np.mod(clusters + rng.normal(0, 0.6 / n_cells, 8000) + shift, TWO_PI)
    book = lloyd_max_samples(angles, 1, n_cells, rtol=1e-10)
    # Every cluster (its arc's ends are 5 deviations away) has its own centroid: the error is the
    # variance of the clusters, known from 8000 samples to 2 %.
    variance = (0.6 / n_cells) ** 2
    assert np.mean(distance(book, angles) ** 2) == pytest.approx(variance, rel=0.06)
    lower, upper = book.cell_edges()
    assert (upper - lower).sum() == pytest.approx(TWO_PI, abs=1e-12)


def test_circle_codes_wrap_and_half_open_cells_hold_their_lower_edge() -> None:
    book = Codebook(
        1, np.array([1.0, 3.0, 5.8]), np.array([0.5, 2.0, 4.5]), is_circle=True
    )  # the last cell runs from 4.5 over the seam to .5
    angles = torch.tensor([0.0, 0.49, 0.5, 1.99, 2.0, 4.5, 6.28], dtype=torch.float64)
    assert book.encode(angles).tolist() == [2, 2, 0, 0, 1, 2, 2]
    assert book.max_cell_radius == pytest.approx(1.5)
    seam_only = book.angle_mse_rad2(UniformCircle())
    by_hand = sum(
        ((b - c) ** 3 - (a - c) ** 3) / 3
        for a, b, c in [(0.5, 2.0, 1.0), (2.0, 4.5, 3.0), (4.5, TWO_PI + 0.5, 5.8)]
    )
    assert seam_only == pytest.approx(by_hand / TWO_PI, rel=1e-12)


def test_fit_of_a_whole_model_takes_seconds() -> None:
    """Not a timed test: it bounds the work. 40 books of every level and width converge at once."""
    rng = np.random.default_rng(0)
    for level in range(1, 5):
        angles = analytic_density(level).ppf(rng.random(4096))
        for n_cells in (2, 4, 8, 16, 32):
            book = lloyd_max_samples(angles, level, n_cells)
            assert book.n_cells == n_cells
            assert book.level == level


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lloyd_max(SinPower(2), 0), "1 to 256 cells, not 0"),
        (lambda: lloyd_max(SinPower(2), 257), "not 257"),
        (lambda: lloyd_max(EmpiricalDensity(np.ones(8)), 4), "which level"),
        (
            lambda: lloyd_max(SinPower(2), 4, start=lloyd_max(SinPower(2), 8)),
            "the warm start has 8 cells",
        ),
        (lambda: Codebook(2, np.array([0.5]), np.array([0.1]), False), "needs 0 thresholds"),
        (lambda: Codebook(1, np.array([0.5]), np.array([0.1]), False), "level 1 is the circle"),
        (lambda: Codebook(2, np.array([0.1, 0.2]), np.array([0.5]), False), "its own cell"),
        (lambda: Codebook(2, np.array([0.1, 2.0]), np.array([0.5]), False), "outside"),
        (lambda: Codebook(2, np.array([0.1, np.nan]), np.array([0.5]), False), "NaN"),
        (lambda: Codebook(2, np.arange(3) * 0.1, np.array([0.15, 0.05]), False), "strictly"),
    ],
)
def test_bad_books_are_refused_in_words(make: object, message: str) -> None:
    with pytest.raises(CodeError, match=message):
        make()  # type: ignore[operator]
