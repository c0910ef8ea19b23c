"""The statistics of the gaussianity and error-by-norm studies against scipy."""

import numpy as np
import pytest
import torch
from scipy import stats

from sphkv_cli.study.error_by_norm import N_BINS, HeadErrors, bin_by_norm
from sphkv_cli.study.gaussianity import (
    density_kurtosis,
    excess_kurtosis,
    layer_normality,
    sphere_ks,
)
from sphkv_codebooks.density import analytic_density


def vectors(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("outlier", [1.0, 4.0])
def test_ks_is_that_of_scipy(outlier: float) -> None:
    d = 16
    x = vectors(0, 101, d)
    x[:, 3] *= outlier
    directions = x / x.norm(dim=-1, keepdim=True)
    a = (d - 1) / 2
    law = stats.beta(a, a, loc=-1, scale=2)
    expected = stats.kstest(directions.flatten().numpy(), law.cdf).statistic
    assert sphere_ks(directions) == pytest.approx(expected, rel=1e-9)


def test_kurtosis_is_that_of_scipy_and_zero_where_nothing_varies() -> None:
    x = vectors(1, 200, 3) ** 3
    x[:, 1] = 2.0
    found = excess_kurtosis(x)
    assert found[0] == pytest.approx(stats.kurtosis(x[:, 0].numpy()), rel=1e-9)
    assert found[1] == 0.0


@pytest.mark.parametrize("level", [2, 3, 6])
def test_kurtosis_of_a_density_is_that_of_its_draws(level: int) -> None:
    draws = analytic_density(level).ppf((np.arange(200_000) + 0.5) / 200_000)
    assert density_kurtosis(level) == pytest.approx(float(stats.kurtosis(draws)), abs=2e-3)


def test_isotropic_vectors_look_isotropic_and_a_bias_does_not() -> None:
    x = vectors(2, 2000, 2, 32).float()
    plain, biased = layer_normality(x), layer_normality(x + 2.0 * torch.eye(32)[0])
    assert plain.ks < 0.01  # 64,000 coordinates: 0.0034 on average
    assert abs(plain.kurtosis) < 0.05 and abs(plain.angle_kurtosis) < 0.1
    assert biased.ks > 2 * plain.ks


def test_bins_keep_every_token_and_shares_sum_to_one() -> None:
    rng = np.random.default_rng(3)
    norm = rng.uniform(1.0, 2.0, 63)  # an odd size
    head = HeadErrors(norm, 0.03 - 1e-6 * norm, 0.1 * norm, rng.random(63), norm**2)
    bins = bin_by_norm([head, head])
    assert bins.norm.shape == (N_BINS,) and (np.diff(bins.norm) > 0).all()
    assert bins.weight_share.sum() == pytest.approx(1.0)
    assert bins.damage_share.sum() == pytest.approx(1.0)
    assert bins.relative == pytest.approx(0.03, rel=1e-3)
    # Absolute error and damage grow with the norm, the relative error falls.
    assert bins.correlation[0, 1] == pytest.approx(1.0)
    assert bins.correlation[0, 2] == pytest.approx(1.0)
    assert bins.correlation[0, 0] == pytest.approx(-1.0)
