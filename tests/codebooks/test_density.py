"""Angle densities against scipy's quadrature and Beta law, and samples of Gaussian vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from sphkv_codebooks.density import (
    HALF_PI,
    TWO_PI,
    AngleDensity,
    EmpiricalDensity,
    SinPower,
    UniformCircle,
    analytic_density,
)
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.polar import to_polar
from sphkv_codebooks.radius_density import RadiusDensity

LEVELS = range(1, 9)


def every_density() -> list[AngleDensity]:
    rng = np.random.default_rng(1)
    # A normal wrapped round the circle: periodic, uneven, with mass on both sides of the seam.
    circle = np.mod(rng.normal(0.3, 1.5, 5000), TWO_PI)
    interval = rng.beta(2, 3, 5000) * HALF_PI
    return [
        *(analytic_density(level) for level in LEVELS),
        EmpiricalDensity.from_samples(circle, is_circle=True, n_bins=512),
        EmpiricalDensity.from_samples(interval, is_circle=False, n_bins=512),
    ]


def quadrature(density: AngleDensity, lower: float, upper: float, weight: object) -> float:
    """Midpoint sum on 2^18 points: exact enough (1e-7) for steps and smooth densities alike."""
    edges = np.linspace(lower, upper, 2**18 + 1)
    middle = 0.5 * (edges[1:] + edges[:-1])
    return float((density.pdf(middle) * weight(middle)).sum() * (upper - lower) / 2**18)  # type: ignore[operator]


@pytest.mark.parametrize("density", every_density(), ids=lambda d: type(d).__name__)
def test_density_integrates_to_one(density: AngleDensity) -> None:
    edges = np.linspace(density.lower, density.upper, 38)
    mass, _, _ = density.partial_moments(edges[:-1], edges[1:], np.zeros(37))
    assert mass.sum() == pytest.approx(1.0, abs=1e-13)
    assert density.cdf(density.upper) == pytest.approx(1.0, abs=1e-13)


@pytest.mark.parametrize("level", range(2, 9))
def test_sin_power_matches_beta_form(level: int) -> None:
    """sin^2(psi) ~ Beta(a, a), scipy's own CDF, and the density is its derivative."""
    density = SinPower(level)
    psi = np.linspace(0.01, HALF_PI - 0.01, 301)
    beta = stats.beta(density.beta_shape, density.beta_shape)
    np.testing.assert_allclose(density.cdf(psi), beta.cdf(np.sin(psi) ** 2), rtol=1e-12)
    # d(sin^2 psi) = sin(2 psi) dpsi
    np.testing.assert_allclose(
        density.pdf(psi), beta.pdf(np.sin(psi) ** 2) * np.sin(2 * psi), rtol=1e-9, atol=1e-280
    )


def test_normalisers_and_deviations_are_the_published_ones() -> None:
    normalisers = [1, 0.6667, 0.45714, 0.31826, 0.22329, 0.15728]
    deviations = [0.34183, 0.24758, 0.17633, 0.12492, 0.08837, 0.06250]
    for level, normaliser, deviation in zip(range(2, 8), normalisers, deviations, strict=True):
        density = SinPower(level)
        exact, _ = integrate.quad(lambda p, m=density.exponent: np.sin(2 * p) ** m, 0, HALF_PI)
        assert density.normaliser == pytest.approx(exact, rel=1e-12)
        assert density.normaliser == pytest.approx(normaliser, rel=1e-4)
        _, _, variance = density.partial_moments(
            np.zeros(1), np.full(1, HALF_PI), np.full(1, HALF_PI / 2)
        )
        # The table prints five digits.
        assert np.sqrt(variance[0]) == pytest.approx(deviation, abs=6e-6)
    level_two = SinPower(2).partial_moments(np.zeros(1), np.full(1, HALF_PI), np.full(1, np.pi / 4))
    assert level_two[2][0] == pytest.approx((np.pi**2 - 8) / 16, rel=1e-12)


@pytest.mark.parametrize("density", every_density(), ids=lambda d: type(d).__name__)
def test_partial_integrals_equal_quadrature(density: AngleDensity) -> None:
    """1, psi - o, (psi - o)^2, cos and sin over part of the support, against a plain sum."""
    lower, upper = 0.21 * density.upper, 0.73 * density.upper
    origin = 0.4 * density.upper
    ends = np.array([lower]), np.array([upper])
    got = [
        *density.partial_moments(*ends, np.array([origin])),
        *density.partial_cos_sin(*ends),
    ]
    weights = [
        np.ones_like,
        lambda p: p - origin,
        lambda p: (p - origin) ** 2,
        np.cos,
        np.sin,
    ]
    for value, weight in zip(got, weights, strict=True):
        # The empirical density jumps at bin edges, where the sum's grid of 6e-6 rad may be off by
        # one point times a height of about 2 per jump: 5e-5.
        assert value[0] == pytest.approx(quadrature(density, lower, upper, weight), abs=5e-5)


def test_intervals_over_the_seam_equal_their_two_parts() -> None:
    for density in every_density():
        if not density.is_circle:
            continue
        whole = density.partial_cos_sin(np.array([5.0]), np.array([TWO_PI + 1.0]))
        left = density.partial_cos_sin(np.array([5.0]), np.array([TWO_PI]))
        right = density.partial_cos_sin(np.array([0.0]), np.array([1.0]))
        np.testing.assert_allclose(whole, np.add(left, right), atol=1e-12)
        whole = density.partial_moments(np.array([5.0]), np.array([TWO_PI + 1.0]), np.array([6.0]))
        left = density.partial_moments(np.array([5.0]), np.array([TWO_PI]), np.array([6.0]))
        # Seen from the next turn the origin lies one turn back.
        right = density.partial_moments(np.array([0.0]), np.array([1.0]), np.array([6.0 - TWO_PI]))
        np.testing.assert_allclose(whole, np.add(left, right), atol=1e-11)


@given(st.integers(2, 8), st.floats(1e-6, 1 - 1e-6))
def test_quantile_inverts_cdf(level: int, probability: float) -> None:
    density = SinPower(level)
    assert float(density.cdf(density.ppf(probability))) == pytest.approx(probability, rel=1e-9)


def test_empirical_quantile_inverts_cdf() -> None:
    density = EmpiricalDensity(np.array([1.0, 4.0, 2.0, 3.0]))
    probability = np.linspace(0.01, 0.99, 41)
    np.testing.assert_allclose(density.cdf(density.ppf(probability)), probability, atol=1e-12)


def test_angles_of_gaussian_vectors_follow_the_analytic_densities() -> None:
    """Kolmogorov-Smirnov on one angle per vector and level: independent samples."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(20_000, 64, dtype=torch.float64, generator=generator)
    polar = to_polar(x, 6)
    for level, angles in enumerate(polar.angles, start=1):
        sample = angles[:, 0].numpy()
        distance = stats.kstest(sample, analytic_density(level).cdf).statistic
        # The 1e-6 critical value of the KS distance is 2.7 / sqrt(n).
        assert distance < 2.7 / np.sqrt(sample.size), level
    # Levels are independent: no correlation between an angle and its parent.
    pairs = np.corrcoef(polar.angles[1][:, 0], polar.angles[2][:, 0])
    assert abs(pairs[0, 1]) < 5 / np.sqrt(20_000)


@pytest.mark.parametrize(("block_dim", "head_dim"), [(2, 128), (16, 64), (16, 128), (16, None)])
def test_radius_density_matches_scipy(block_dim: int, head_dim: int | None) -> None:
    density = RadiusDensity(block_dim, head_dim)
    edges = np.linspace(0.0, density.upper, 40)
    mass, first, second = density.partial_moments(edges[:-1], edges[1:], np.zeros(39))
    assert mass.sum() == pytest.approx(1.0, abs=1e-12)
    assert second.sum() == pytest.approx(1.0, abs=1e-12)
    assert first.sum() == pytest.approx(density.moment(1.0), rel=1e-12)
    if head_dim is None:
        law = stats.chi2(block_dim, scale=1 / block_dim)
    else:
        n_blocks = head_dim / block_dim
        law = stats.beta(block_dim / 2, (head_dim - block_dim) / 2, scale=n_blocks)
    np.testing.assert_allclose(np.cumsum(mass), law.cdf(edges[1:] ** 2), atol=1e-12)
    middle = 0.5 * (edges[1:] + edges[:-1])
    np.testing.assert_allclose(density.pdf(middle), law.pdf(middle**2) * 2 * middle, rtol=1e-9)


def test_radius_law_is_that_of_gaussian_blocks() -> None:
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(20_000, 64, dtype=torch.float64, generator=generator)
    rho = x[:, :16].norm(dim=-1) * 2.0 / x.norm(dim=-1)
    law = stats.beta(8, 24, scale=4)
    assert stats.kstest((rho**2).numpy(), law.cdf).statistic < 2.7 / np.sqrt(20_000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SinPower(1), "level 1 is UniformCircle"),
        (lambda: SinPower(17), "levels 2 to 16"),
        (lambda: EmpiricalDensity(np.zeros(4)), "not all of them zero"),
        (lambda: EmpiricalDensity(np.array([1.0, -1.0])), "counts >= 0"),
        (lambda: EmpiricalDensity(np.array([1.0, np.nan])), "finite"),
        (lambda: EmpiricalDensity.from_samples([], is_circle=True), "at least one"),
        (lambda: EmpiricalDensity.from_samples([np.inf], is_circle=True), "finite"),
        (lambda: EmpiricalDensity.from_samples([2.0], is_circle=False), r"\[0, 1.570796\]"),
        (lambda: RadiusDensity(128, 128), "the radius is the norm"),
    ],
)
def test_bad_input_is_refused_in_words(make: object, message: str) -> None:
    with pytest.raises(CodeError, match=message):
        make()  # type: ignore[operator]


def test_level_one_is_uniform() -> None:
    assert isinstance(analytic_density(1), UniformCircle)
    assert analytic_density(1).cdf(np.pi) == pytest.approx(0.5)
