"""Histograms of angles agree with scipy's test on the same angles, and do not depend on chunks."""

import numpy as np
import pytest
import torch
from scipy import stats

from sphkv_cli.fit.angle_statistics import (
    N_BINS,
    count_angles,
    isotropic_kurtosis,
    ks_distances,
    ks_of_sampling,
)
from sphkv_codebooks.density import analytic_density
from sphkv_codebooks.polar import to_polar


def vectors(n: int, n_heads: int = 2, head_dim: int = 32, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, n_heads, head_dim, generator=generator)


@pytest.mark.parametrize("pairing", ["adjacent", "rope"])
def test_ks_distance_is_that_of_scipy_to_the_mass_of_one_bin(pairing: str) -> None:
    x = vectors(500) * torch.linspace(0.5, 2.0, 32)  # not isotropic: a real distance
    counted = count_angles([x], pairing)
    for level, angles in enumerate(to_polar(x, 5, pairing).angles, start=1):
        density = analytic_density(level)
        edges = np.linspace(0.0, density.upper, N_BINS + 1)
        one_bin = np.diff(density.cdf(edges)).max()
        for head in range(2):
            samples = angles[:, head].flatten().double().numpy()
            exact = stats.kstest(samples, density.cdf).statistic
            found = ks_distances(counted.counts[level - 1], level)[head]
            assert abs(found - exact) <= one_bin + 2.0 / samples.size


def test_counts_do_not_depend_on_how_tokens_are_cut() -> None:
    x = vectors(129)
    whole = count_angles([x], "adjacent")
    parts = count_angles(x.split([1, 63, 65]), "adjacent")
    assert all((a == b).all() for a, b in zip(whole.counts, parts.counts, strict=True))
    assert [c.sum() for c in whole.counts] == [129 * 2 * 32 >> level for level in range(1, 6)]
    assert parts.kurtosis == pytest.approx(whole.kurtosis, rel=1e-6)
    assert parts.n_vectors == 129


def test_isotropic_vectors_pass_and_skewed_ones_do_not() -> None:
    isotropic = count_angles([vectors(4000)], "adjacent")
    skewed = count_angles([vectors(4000) * torch.linspace(0.2, 3.0, 32)], "adjacent")
    for level in range(1, 6):
        by_chance = ks_of_sampling(isotropic.n_angles(level))
        # The Kolmogorov distribution passes 2.2 times its mean once in 1,700 draws.
        assert ks_distances(isotropic.counts[level - 1], level).max() < 2.2 * by_chance
    assert ks_distances(skewed.counts[4], 5).max() > 20 * ks_of_sampling(4000)


def test_kurtosis_of_directions_runs_from_flat_to_one_hot() -> None:
    flat = count_angles([torch.ones(5, 1, 16)], "adjacent")
    one_hot = count_angles([torch.eye(16)[:, None, :]], "adjacent")
    gaussian = count_angles([vectors(20000, head_dim=16)], "adjacent")
    assert flat.kurtosis == pytest.approx([1.0])
    assert one_hot.kurtosis == pytest.approx([16.0])
    # 40,000 vectors: the standard error of the mean is about 0.2 %.
    assert gaussian.kurtosis == pytest.approx(isotropic_kurtosis(16), rel=0.01)


def test_zero_vectors_are_counted_and_harm_nothing() -> None:
    counted = count_angles([torch.zeros(3, 1, 8)], "adjacent")
    assert np.isfinite(counted.kurtosis).all()
    assert counted.counts[0].sum() == 12


def test_the_distance_of_sampling_is_the_mean_kolmogorov_distance() -> None:
    assert ks_of_sampling(1) == pytest.approx(stats.kstwobign.mean(), rel=1e-6)
    assert ks_of_sampling(400) == pytest.approx(stats.kstwobign.mean() / 20, rel=1e-6)
