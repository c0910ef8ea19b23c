"""Frozen quotas: within every budget, exact where they can be, and true to their fractions."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from sphkv_cli.allocation.policy import QuotaPolicy, fit_quotas

SIZES = np.array([[0, 10, 16, 40], [0, 12, 18, 42]])


def bytes_of(plan: np.ndarray, sizes: np.ndarray = SIZES) -> int:
    layers = np.arange(plan.shape[0])[:, None, None]
    return int(sizes[layers, plan].sum())


plans = st.integers(1, 12).flatmap(
    lambda n_pages: arrays(np.int8, (2, 3, n_pages), elements=st.integers(0, 3))
)


@given(plans, st.integers(1, 40), st.floats(0, 1.2))
@settings(max_examples=200, deadline=None)
def test_budget_is_never_exceeded(fitted: np.ndarray, n_pages: int, share: float) -> None:
    policy = fit_quotas([fitted], 4)
    budget = int(share * n_pages * 3 * SIZES[:, -1].sum())
    plan = policy.apply(n_pages, SIZES, budget)
    assert plan.shape == (2, 3, n_pages)
    assert bytes_of(plan) <= budget
    assert np.all(np.diff(plan, axis=-1) <= 0), "pages of higher score get no smaller tier"


@given(plans)
@settings(max_examples=200, deadline=None)
def test_a_policy_repeats_the_plan_it_was_fitted_on(fitted: np.ndarray) -> None:
    in_order = -np.sort(-fitted, axis=-1)
    plan = fit_quotas([fitted], 4).apply(fitted.shape[-1], SIZES, bytes_of(fitted))
    assert np.array_equal(plan, in_order)


@given(plans, st.integers(2, 5))
@settings(max_examples=100, deadline=None)
def test_a_longer_context_gets_the_same_fractions(fitted: np.ndarray, times: int) -> None:
    policy = fit_quotas([fitted], 4)
    plan = policy.apply(times * fitted.shape[-1], SIZES, times * bytes_of(fitted))
    found = fit_quotas([plan], 4)
    np.testing.assert_allclose(found.fractions, policy.fractions, atol=1e-12)


@given(st.lists(plans, min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_fractions_are_a_partition_and_are_read_back(fitted: list[np.ndarray]) -> None:
    policy = fit_quotas(fitted, 4)
    np.testing.assert_allclose(policy.fractions.sum(axis=-1), 1.0, atol=1e-12)
    again = QuotaPolicy.from_fractions(policy.fractions)
    np.testing.assert_allclose(again.at_least, policy.at_least, atol=1e-12)


def test_bytes_that_rounding_leaves_go_to_the_largest_remainders() -> None:
    # Head 0 wants 1.8 pages of option 1, head 1 wants 1.4: five bytes a page, 3 pages in all.
    policy = QuotaPolicy(np.array([[[0.45], [0.35]]]))
    plan = policy.apply(4, np.array([[0, 5]]), 16)
    assert plan.tolist() == [[[1, 1, 0, 0], [1, 0, 0, 0]]]
    assert policy.apply(4, np.array([[0, 5]]), 14).sum() == 2


def test_mean_fractions_of_several_documents() -> None:
    one = np.zeros((1, 1, 4), dtype=np.int8)
    other = np.array([[[1, 1]]], dtype=np.int8)
    assert fit_quotas([one, other], 2).fractions.tolist() == [[[0.5, 0.5]]]


def test_a_wrong_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        QuotaPolicy(np.array([[[0.5, 0.6]]]))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        QuotaPolicy(np.array([[[1.5, 0.6]]]))
    with pytest.raises(ValueError, match="three axes"):
        QuotaPolicy(np.array([0.5]))
    with pytest.raises(ValueError, match="below that of dropping all"):
        QuotaPolicy(np.array([[[0.5]]])).apply(2, np.array([[3, 5]]), 5)
