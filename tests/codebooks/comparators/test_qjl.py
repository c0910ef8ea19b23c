"""QJL: unbiased, with the variance that its projection must have."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_codebooks.comparators.qjl import Qjl
from sphkv_codebooks.errors import CodeError


def vectors(seed: int, n: int, head_dim: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, head_dim)))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-1.0, 1.0))
def test_many_projections_give_the_inner_product(seed: int, cosine: float) -> None:
    n_projections, head_dim = 60_000, 8
    k, other = vectors(seed, 2, head_dim)
    other = other - (other @ k) / (k @ k) * k
    q = cosine * k / k.norm() + math.sqrt(1 - cosine**2) * other / other.norm()
    method = Qjl.sample(head_dim, n_projections, np.random.default_rng(seed + 1))
    estimate = float(method.logits(q[None], k[None]))
    truth = float(q @ k)
    variance = (math.pi / 2 * float(k @ k) - truth**2) / n_projections
    # 5 standard deviations of the estimator, and half a unit of the fp16 norm.
    assert estimate == pytest.approx(truth, abs=5 * math.sqrt(variance) + 2**-11 * abs(truth))


@pytest.mark.parametrize("cosine", [0.0, 0.6, 1.0])
def test_variance_is_exact_and_within_its_bound(cosine: float) -> None:
    head_dim, n_projections, n_draws = 16, 8, 4000
    q = torch.zeros(1, head_dim, dtype=torch.float64)
    k = torch.zeros(1, head_dim, dtype=torch.float64)
    k[0, 0] = 2.0
    q[0, 0], q[0, 1] = 3 * cosine, 3 * math.sqrt(1 - cosine**2)
    generator = np.random.default_rng(7)
    errors = torch.stack(
        [
            Qjl.sample(head_dim, n_projections, generator).logits(q, k) - q @ k.T
            for _ in range(n_draws)
        ]
    ).flatten()
    predicted = (math.pi / 2 * 36 - 36 * cosine**2) / n_projections
    bound = math.pi / 2 * 36 / n_projections
    # The fourth moment is at most a little above a normal's: a variance of n draws is good to
    # sqrt(2/n) = 2.2 %, taken 4.5 times.
    assert float(errors.square().mean()) == pytest.approx(predicted, rel=0.1)
    assert predicted <= bound
    assert abs(float(errors.mean())) < 4 * math.sqrt(predicted / n_draws)


def test_a_zero_key_has_logit_zero_and_a_key_its_own_scale() -> None:
    method = Qjl.sample(32, 64, np.random.default_rng(0))
    q, k = vectors(1, 5, 32), vectors(2, 3, 32)
    k[1] = 0
    logits = method.logits(q, k)
    assert torch.equal(logits[:, 1], torch.zeros(5, dtype=torch.float64))
    assert torch.equal(method.logits(q, 8 * k), 8 * logits)


def test_rate_is_signs_and_a_norm() -> None:
    assert Qjl.sample(64, 64, np.random.default_rng(0)).rate(64, 5) == 1.25
    assert Qjl.sample(64, 192, np.random.default_rng(0)).rate(64, 5) == 3.25


def test_a_projection_that_is_none_is_refused() -> None:
    for broken in (np.zeros(4), np.zeros((0, 4)), np.full((4, 4), np.nan)):
        with pytest.raises(CodeError):
            Qjl(broken)
