"""Laws of the retention rows: equal bytes, measured runs, published budgets, dominance."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sphkv_cli.allocation.budget import Budget
from sphkv_cli.allocation.frozen import FrozenAllocation
from sphkv_cli.allocation.published import WINDOW, ada_counts, even_counts, pyramid_counts
from sphkv_cli.artifacts.allocation import AllocationReader
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.evaluation.context_measure import horizon_positions, measure_context
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.protocol import RetentionProtocol
from sphkv_cli.evaluation.retained_context import ContextTiers, RetainedContext
from sphkv_cli.evaluation.retention_rows import (
    ORACLE,
    PLAN,
    POLICY,
    Controls,
    place_all,
    wanted_kinds,
)


@pytest.fixture(scope="module")
def model(tiny_chain: Any) -> JudgedModel:
    from transformers import AutoModelForCausalLM

    return JudgedModel.of(AutoModelForCausalLM.from_pretrained(tiny_chain.model).eval())


@pytest.fixture(scope="module")
def frozen(tiny_chain: Any) -> FrozenAllocation:
    with AllocationReader(tiny_chain.allocation) as plans:
        return FrozenAllocation.of(plans, 512)


@pytest.fixture(scope="module")
def document(tiny_chain: Any) -> tuple[Any, torch.Tensor]:
    with AllocationReader(tiny_chain.allocation) as plans, CaptureReader(tiny_chain.capture) as cap:
        info = plans.documents[0]
        found = next(d for d in cap.documents if d.index == info.index)
        return info, torch.from_numpy(cap.token_ids(found))


def test_a_text_measured_in_a_run_is_planned_as_from_its_capture(
    tiny_chain: Any, model: JudgedModel, frozen: FrozenAllocation, document: Any
) -> None:
    info, ids = document
    context = measure_context(model, frozen, "text", ids, info.n_context)
    planned = frozen.planner.plan(context.document)
    assert planned.policy.laid_out.total == info.policy_bytes
    # The run asks fewer queries before the window and sees no rounding of the capture.
    assert planned.plan.cost == pytest.approx(info.cost, rel=0.1)
    with AllocationReader(tiny_chain.allocation) as plans:
        stored = plans.tier_of_token(plans.documents[0])
    assert np.mean(planned.plan.option_of_token - 1 == stored) > 0.8


@pytest.mark.parametrize("budget", ["1.5b", "3b", "5b", "9b"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_no_row_is_laid_out_above_the_budget(
    model: JudgedModel, frozen: FrozenAllocation, document: Any, budget: str, share: float
) -> None:
    info, ids = document
    n_context = int(info.n_context * share) // 3 * 3 + 1
    frozen = frozen.at(Budget.parse(budget), n_context)
    context = measure_context(model, frozen, "text", ids, n_context)
    planner = frozen.planner
    n_bytes = planner.budget.resolve(planner.layout.n_coordinates(n_context)).n_bytes
    rows = place_all(context, planner, wanted_kinds("all"), Controls({}))
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert {PLAN, POLICY, ORACLE, "SnapKV, bf16", "Ada-KV, bf16"} <= set(names)
    for row in rows:
        coding = row.coding(frozen, model.shape)
        assert coding.laid_out_bytes <= n_bytes, row.name
        assert coding.tier_of_token.shape[-1] == n_context
    # What eviction leaves unspent is less than one token.
    spent = {row.name: row.coding(frozen, model.shape).laid_out_bytes for row in rows}
    for name in ("SnapKV, bf16", "PyramidKV, bf16", "Ada-KV, bf16"):
        assert n_bytes - spent[name] < 4 * planner.layout.head_dim
        kept = next(row for row in rows if row.name == name).option_of_page > 0
        each = kept.sum(axis=-1)
        assert each.min() >= min(WINDOW, each.mean()) - 1


def test_parts_that_are_taken_away_never_lower_the_predicted_cost(
    model: JudgedModel, frozen: FrozenAllocation, document: Any
) -> None:
    info, ids = document
    frozen = frozen.at(Budget.parse("10b"), info.n_context)
    context = measure_context(model, frozen, "text", ids, info.n_context)
    rows = {
        row.name: row
        for row in place_all(context, frozen.planner, wanted_kinds("all"), Controls({}))
    }
    plan = rows[PLAN].cost
    pinned = rows["joint, first 4 and last 32 pinned"].coding(frozen, model.shape).tier_of_token
    assert (pinned[..., :4] == pinned.max()).all()
    assert (pinned[..., -32:] == pinned.max()).all()
    for name in ("joint, no drop", "joint, no top tier", POLICY, "uniform"):
        assert rows[name].cost >= plan * (1 - 1e-9), name


def test_the_price_of_a_drop_moves_the_plan(
    model: JudgedModel, frozen: FrozenAllocation, document: Any
) -> None:
    info, ids = document
    frozen = frozen.at(Budget.parse("2b"), info.n_context)
    context = measure_context(model, frozen, "text", ids, info.n_context)
    dear = replace(
        frozen.planner.coefficients, drop=1e3 * np.ones_like(frozen.planner.coefficients.drop)
    )
    kept = [
        planner.plan(context.document).plan.option_of_page > 0
        for planner in (frozen.planner, frozen.planner.priced_at(dear))
    ]
    assert kept[1].sum() >= kept[0].sum()


@pytest.mark.parametrize("total", [0, 1, 90, 400, 90 * 40, 90 * 192])
def test_published_budgets_spend_all_tokens_and_no_head_more_than_it_has(total: int) -> None:
    n_context, shape = 192, (30, 3)
    scores = np.random.default_rng(1).random((*shape, n_context))
    scores[..., -WINDOW:] = np.inf
    for counts in (
        even_counts(total, n_context, *shape),
        pyramid_counts(total, n_context, *shape),
        ada_counts(scores, total),
    ):
        assert counts.sum() == total
        assert counts.min() >= 0 and counts.max() <= n_context


def test_pyramid_budgets_fall_over_the_layers_and_end_at_a_twentieth_beside_the_window() -> None:
    counts = pyramid_counts(30 * 3 * (40 + WINDOW), 400, 30, 3)
    per_layer = counts.sum(axis=1) - 3 * WINDOW
    assert np.all(np.diff(per_layer) <= 0)
    assert per_layer[0] == pytest.approx(3 * (2 * 40 - 2), abs=3)
    assert per_layer[-1] == pytest.approx(3 * 2, abs=3)


def test_ada_budgets_follow_the_scores_above_an_even_floor_beside_the_window() -> None:
    rng = np.random.default_rng(2)
    scores = rng.random((2, 4, 640 + WINDOW))
    scores[:, 0] += 10.0
    scores[..., -WINDOW:] = np.inf
    counts = ada_counts(scores, 2 * 4 * (160 + WINDOW)) - WINDOW
    assert np.all(counts.sum(axis=1) == 640)
    # Head 0 holds the layer's best 640 tokens: 80 % go to it, and its even part of the rest.
    assert np.all(counts[:, 0] == 512 + 32)
    assert np.all(counts[:, 1:] == 32)


def test_a_context_read_after_one_dense_run_scores_as_a_run_of_its_own(
    model: JudgedModel, frozen: FrozenAllocation, document: Any
) -> None:
    info, ids = document
    frozen = frozen.at(Budget.parse("3b"), info.n_context)
    measured = measure_context(model, frozen, "text", ids, info.n_context)
    context = RetainedContext.of(model, "text", ids, info.n_context)
    tiers = ContextTiers(frozen.planner.layout.tiers, frozen.frames, context)
    rows = place_all(measured, frozen.planner, ("own", "published"), Controls({}))
    dense = model.dense_hidden(ids)[info.n_context :]
    torch.testing.assert_close(context.hidden, dense, atol=1e-4, rtol=1e-4)
    for row in rows:
        coding = row.coding(frozen, model.shape)
        whole, _ = model.coded_hidden(ids, coding, RetentionProtocol(info.n_context))
        found = context.read(tiers, coding.tier_of_token)
        # float32 in another order of summation at most; what coding does is far above it.
        torch.testing.assert_close(found, whole[info.n_context :], atol=1e-4, rtol=1e-4)
        assert (found - dense).abs().max() > 1e-2, row.name


def test_output_errors_fall_with_the_budget_and_vanish_for_a_dense_cache(
    model: JudgedModel, frozen: FrozenAllocation, document: Any
) -> None:
    info, ids = document
    context = RetainedContext.of(model, "text", ids, info.n_context)
    tiers = ContextTiers(frozen.planner.layout.tiers, frozen.frames, context)
    measured = measure_context(model, frozen, "text", ids, info.n_context)
    found = []
    for budget in ("3b", "9b"):
        at = frozen.at(Budget.parse(budget), info.n_context)
        plan = place_all(measured, at.planner, ("own",), Controls({}))[0]
        coding = plan.coding(at, model.shape)
        found.append(context.output_error(tiers, coding.tier_of_token))
    dense = np.full_like(coding.tier_of_token, len(tiers.tiers) - 1)
    found.append(context.output_error(tiers, dense))
    assert found[0].mean > found[1].mean > found[2].mean
    # bfloat16 keeps 8 bits of mantissa.
    assert found[2].p99 < 2**-7
    assert all(error.p99 >= error.mean for error in found)


def test_the_oracle_sees_every_query_that_is_scored() -> None:
    assert horizon_positions(1536, 2048).tolist() == list(range(1536, 2048))
    assert horizon_positions(10, 11).tolist() == [10]
    far = horizon_positions(100, 5000)
    assert far.numel() == 512 == far.unique().numel() and (far[0], far[-1]) == (100, 4999)
