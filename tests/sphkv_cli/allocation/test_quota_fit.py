"""Quotas fitted anew: for any budget and length, within the bytes, and what is pinned stays."""

from typing import Any

import h5py
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from sphkv_cli.allocation.budget import Budget
from sphkv_cli.allocation.frozen import stored_planner
from sphkv_cli.allocation.layout import PageLayout
from sphkv_cli.allocation.options import AllocateOptions
from sphkv_cli.allocation.page_costs import Coefficients, plan_cost
from sphkv_cli.allocation.pins import Pins
from sphkv_cli.allocation.quota_fit import (
    BudgetPrices,
    QuotaFit,
    apply_quotas,
    priced,
    solve_pages,
    stretched,
)
from sphkv_cli.allocation.stage import allocate
from sphkv_cli.artifacts.allocation import AllocationReader
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.errors import ArtifactError, UsageError
from sphkv_cli.generation.context_policy import ContextPolicy
from sphkv_kernels.tier import TierFormat

from .conftest import OPTIONS, Chain

LAYOUT = PageLayout(
    tiers=(TierFormat.int8(), TierFormat.dense()),
    head_dim=32,
    page_size=16,
    n_kv_heads=2,
    stores_positions=(False, False, False),
    fixed_bytes=0,
)
HEADS = (3, 2)
ONES = Coefficients.constant(HEADS, 1.0)


def costs_of(n_pages: int, seed: int = 0) -> np.ndarray:
    """Costs that fall with the rank and with the tier, heads at their own levels."""
    rng = np.random.default_rng(seed)
    need = np.exp(rng.normal(0, 2, (*HEADS, 1)) - 6 * np.linspace(0, 1, n_pages))
    tiers = np.array([1.0, 1e-3, 1e-6])
    return (need[..., None] * tiers).astype(np.float32)


def bytes_of(options: np.ndarray) -> int:
    return int(LAYOUT.option_bytes()[np.arange(3)[:, None, None], options].sum())


@given(
    st.integers(1, 30),
    st.integers(1, 300),
    st.floats(0.05, 1.0),
    st.integers(0, 20),
    st.integers(0, 40),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_refitted_quotas_hold_the_budget_and_keep_what_is_pinned(
    known: int, n_context: int, share: float, first: int, last: int, no_drop: bool
) -> None:
    pins = Pins(first, last, no_drop)
    least = pins.minimum_bytes(LAYOUT, n_context)
    dense = LAYOUT.dense_bytes(n_context)
    budget = int(least + share * (dense - least)) - LAYOUT.overhead_bytes()
    fit = QuotaFit((costs_of(known), costs_of(known + 3, 1)), BudgetPrices.of([(2.0, ONES)]))
    quotas = fit.quotas(LAYOUT, ONES, budget, n_context, pins)
    options = apply_quotas(quotas, LAYOUT, budget, pins, n_context)
    assert options.shape == (*HEADS, LAYOUT.n_pages(n_context))
    assert bytes_of(options) <= budget
    n_pinned = pins.n_pages(16, n_context)
    assert n_pinned * 16 >= min(first + last, n_context)
    assert (options[..., :n_pinned] == 2).all()
    assert options.min() >= int(no_drop)


def test_what_must_be_kept_is_all_that_the_least_budget_pays_for() -> None:
    pins = Pins(4, 20, no_drop=True)
    least = pins.minimum_bytes(LAYOUT, 100)
    costs = costs_of(7)
    options, solution = solve_pages(costs, LAYOUT, least - LAYOUT.overhead_bytes(), pins, 100)
    assert bytes_of(options) + LAYOUT.overhead_bytes() == least
    assert options[0, 0].tolist() == [2, 2, 1, 1, 1, 1, 1]
    assert solution.plan.cost == pytest.approx(plan_cost(costs, options))
    pins.require(LAYOUT, 100, least, "a text")
    with pytest.raises(
        UsageError, match="4 first and the 20 last tokens and all tokens in some tier"
    ):
        pins.require(LAYOUT, 100, least - 1, "a text")


def test_quotas_of_one_document_at_its_own_length_repeat_its_plan() -> None:
    costs = costs_of(12)
    budget = bytes_of(np.full((*HEADS, 12), 1)) * 2 // 3
    plan, _ = solve_pages(costs, LAYOUT, budget, Pins(), 12 * 16)
    fit = QuotaFit((costs,), BudgetPrices.of([(2.0, ONES)]))
    quotas = fit.quotas(LAYOUT, ONES, budget, 12 * 16, Pins())
    options = apply_quotas(quotas, LAYOUT, bytes_of(plan), Pins(), 12 * 16)
    np.testing.assert_array_equal(options, plan)


def test_stretched_costs_keep_the_first_pages_and_the_curve_of_the_others() -> None:
    costs = costs_of(12).astype(np.float64)
    np.testing.assert_array_equal(stretched(costs, 12), costs)
    for n_pages, n_fixed in ((31, 1), (5, 1), (40, 3), (2, 2)):
        found = stretched(costs, n_pages, n_fixed)
        np.testing.assert_allclose(found[:, :, :n_fixed], costs[:, :, :n_fixed])
        # These costs are exponentials of the rank: any mixture of logarithms lies on their line.
        place = (
            n_fixed
            - 0.5
            + (np.arange(n_pages - n_fixed) + 0.5) * (12 - n_fixed) / max(n_pages - n_fixed, 1)
        )
        place = np.maximum(place, n_fixed)
        line = np.interp(place, np.arange(12), np.log(costs[1, 1, :, 0]))
        np.testing.assert_allclose(np.log(found[1, 1, n_fixed:, 0]), line, rtol=1e-9)
    assert stretched(costs, 1).shape[2] == stretched(costs[:, :, :1], 1).shape[2] == 1
    assert stretched(np.zeros((1, 1, 3, 2)), 5).max() < 1e-290


def test_a_sink_does_not_leak_into_the_pages_after_it() -> None:
    costs = np.ones((1, 1, 48, 2))
    costs[:, :, 0] = 1000.0
    for n_pages in (2, 20, 128, 240):
        found = stretched(costs, n_pages)
        np.testing.assert_allclose(found[:, :, 0], 1000.0, rtol=1e-12)
        np.testing.assert_allclose(found[:, :, 1:], 1.0, rtol=1e-12)


def test_a_sink_keeps_its_page_in_shorter_and_longer_contexts() -> None:
    costs = np.full((*HEADS, 24, 3), 1e-9, dtype=np.float32)
    costs[:, :, 0] = [1.0, 1e-2, 1e-6]
    costs[:, :, 1:] *= np.array([1.0, 0.1, 0.01], dtype=np.float32)
    fit = QuotaFit((costs,), BudgetPrices.of([(2.0, ONES)]))
    for n_pages in (6, 24, 96):
        n_context = 16 * n_pages
        one_dense_page = int(LAYOUT.option_bytes()[:, -1].sum()) * 2
        options = apply_quotas(
            fit.quotas(LAYOUT, ONES, one_dense_page, n_context, Pins()),
            LAYOUT, one_dense_page, Pins(), n_context,
        )  # fmt: skip
        assert (options[..., 0] == 2).all()


def test_prices_are_interpolated_in_logarithms_and_constant_beyond_the_ends() -> None:
    found = [(rate, Coefficients.constant(HEADS, drop, 1.0)) for rate, drop in ((4, 3), (1, 12))]
    prices = BudgetPrices.of(found)
    for rate, drop in ((0.5, 12), (1, 12), (2, 6), (4, 3), (9, 3)):
        np.testing.assert_allclose(prices.at(rate).drop, drop)
    costs = priced(costs_of(3), prices.at(2.0))
    np.testing.assert_allclose(costs[..., 0], 6 * costs_of(3)[..., 0].astype(np.float64))
    np.testing.assert_allclose(costs[..., 1:], costs_of(3)[..., 1:].astype(np.float64))
    with pytest.raises(ValueError, match="rise"):
        BudgetPrices(np.array([2.0, 1.0]), prices.drop, prices.code)


def test_an_allocation_serves_another_budget_as_one_made_for_it(
    allocation: Any, chain: Chain, tmp_path: Any
) -> None:
    _, path = allocation
    own = tmp_path / "own.h5"
    fixed = {"drop_coefficient": 8.0, "code_coefficient": 1.0}
    for name, budget in (("5b.h5", "5b"), ("own.h5", "3b")):
        options = AllocateOptions(budget=budget, page_size=16, horizon=48, window=32, **fixed)
        allocate(options, chain.capture, chain.codebooks, tmp_path / name)
    with AllocationReader(tmp_path / "5b.h5") as other, AllocationReader(own) as reader:
        n_context = reader.documents[0].n_context
        asked = stored_planner(other, 512).at(Budget.parse("3b"), n_context)
        expected = stored_planner(reader, 512).options_of_pages(n_context)
        np.testing.assert_array_equal(asked.options_of_pages(n_context), expected)
        assert not np.array_equal(expected, stored_planner(other, 512).options_of_pages(n_context))
        policy = ContextPolicy.of(other, 512, "3b")
        np.testing.assert_array_equal(policy.options_of_pages(n_context), expected)
        # The plan that was stored is that of the same quotas.
        document = reader.documents[0]
        assert policy.laid_out_bytes(n_context) == document.policy_bytes
    with AllocationReader(path) as reader:
        fit = reader.quota_fit
        assert fit is not None
        # The default fits prices at the budget and at 1 bit and 4 bits where they are not near it.
        assert fit.rates.tolist() == pytest.approx([5.0])
        assert [pages.shape[:2] for pages in fit.pages] == [(2, 2)] * len(fit.pages)


def test_a_file_without_fit_costs_scales_its_quotas(allocation: Any, tmp_path: Any) -> None:
    _, path = allocation
    import shutil

    from sphkv_cli.artifacts.store import content_digest

    copied = tmp_path / "old.h5"
    shutil.copy(path, copied)
    with h5py.File(copied, "r+") as file:
        del file["policy/fit"], file["policy/price_rates"]
        del file["policy/price_of_drop"], file["policy/price_of_code"]
        for name in ("pin_first", "pin_last", "no_drop"):
            del file.attrs[name]
        file.attrs["digest"] = content_digest(file)
    with AllocationReader(copied) as old, AllocationReader(path) as new:
        assert old.quota_fit is None
        assert old.info == new.info
        n_context = new.documents[0].n_context
        # At the length and budget of the quotas both say the same.
        one, other = (stored_planner(reader, 512) for reader in (old, new))
        np.testing.assert_array_equal(
            one.options_of_pages(n_context), other.options_of_pages(n_context)
        )
    with h5py.File(copied, "r+") as file:
        file["policy/fit/000"] = np.zeros((2, 2, 4, 3), dtype=np.float32)
        file["policy/fit/000"].attrs["axes"] = ""
        file.attrs["digest"] = content_digest(file)
    with pytest.raises(ArtifactError, match="policy/fit/000"), AllocationReader(copied):
        pass


def test_pinned_tokens_stay_in_the_largest_tier_of_plans_and_of_the_policy(
    chain: Chain, tmp_path: Any
) -> None:
    options = AllocateOptions(
        budget="8b", page_size=16, horizon=48, window=32, pin_first=3, pin_last=20, no_drop=True,
        drop_coefficient=8.0, code_coefficient=1.0,
    )  # fmt: skip
    result = allocate(options, chain.capture, chain.codebooks, tmp_path / "a.h5")
    assert "3 first and the 20 last" in result.summary.pins
    with AllocationReader(tmp_path / "a.h5") as reader, CaptureReader(chain.capture) as capture:
        document = reader.documents[0]
        policy = ContextPolicy.of(reader, 512)
        largest = len(reader.tiers) - 1
        placed = []
        for layer in range(capture.n_layers):
            keys, values = (
                _tensor(read(document.index, layer))[: document.n_context]
                for read in (capture.keys, capture.values)
            )
            asked = policy.asked_tokens(document.n_context)
            positions = capture.query_positions(capture.documents[document.index])
            rows = np.searchsorted(positions, asked.numpy())
            queries = _tensor(capture.queries(document.index, layer))[rows]
            place = policy.place(layer, queries, keys, values, _tensor(np.arange(len(keys))))
            placed.append(place[0].numpy().T)
        for plan in (
            reader.tier_of_token(document),
            reader.policy_tier_of_token(document),
            np.stack(placed),
        ):
            assert (plan[..., :3] == largest).all()
            assert (plan[..., -20:] == largest).all()
            assert plan.min() >= 0
            assert len(np.unique(plan)) > 1
        assert document.laid_out_bytes <= document.budget_bytes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pin_last": 200, "budget": "4b"}, "the 200 last tokens .* pin fewer"),
        ({"no_drop": True, "budget": "2b"}, "all tokens in some tier .* at least [0-9.]+b"),
        ({"pin_first": -1}, "--pin-first is -1"),
    ],
)
def test_pins_that_the_budget_cannot_pay_for_are_refused(
    changes: dict[str, Any], words: str, chain: Chain, tmp_path: Any
) -> None:
    from dataclasses import replace

    with pytest.raises(UsageError, match=words):
        allocate(replace(OPTIONS, **changes), chain.capture, chain.codebooks, tmp_path / "a.h5")
    assert list(tmp_path.iterdir()) == []


def test_a_price_of_drops_is_not_called_fitted_where_nothing_is_dropped(
    chain: Chain, tmp_path: Any
) -> None:
    options = AllocateOptions(budget="8b", page_size=16, horizon=48, window=32, no_drop=True)
    summary = allocate(options, chain.capture, chain.codebooks, tmp_path / "a.h5").summary
    assert summary.drop_coefficient == pytest.approx(8)
    assert "dropped nothing" in summary.drop_coefficient_source
    assert "fitted" in summary.code_coefficient_source


def _tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.asarray(array))
