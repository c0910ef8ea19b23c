"""What of an allocation goes into allocation.h5."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sphkv_cli.allocation.agreement import LayerAgreement
from sphkv_cli.allocation.discovery import PositionRow, SinkRow
from sphkv_cli.allocation.estimator_store import estimator_arrays, estimator_signals
from sphkv_cli.allocation.estimators import UtilityEstimator
from sphkv_cli.allocation.head_weights import HeadWeighting
from sphkv_cli.allocation.options import AllocateOptions
from sphkv_cli.allocation.planning import PlannedDocument, Planner
from sphkv_cli.allocation.policy import ROUNDING_RULE
from sphkv_cli.allocation.quota_fit import QuotaFit
from sphkv_cli.allocation.result import AllocationSummary, HeadMix
from sphkv_cli.artifacts.allocation_content import (
    AllocationContent,
    AllocationInfo,
    CalibrationArrays,
    PlanInfo,
    QuotaFitArrays,
    StoredPlan,
)
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_codebooks.frame import FrameSet


@dataclass(frozen=True)
class ComparisonRow:
    """A plan of one document; measured is NaN where its future may not be looked at."""

    document: str
    split: str
    name: str
    tier: str
    cost: float
    laid_out_bytes: int
    measured: float


def allocation_content(
    options: AllocateOptions,
    capture: CaptureReader,
    frames: FrameSet,
    estimator: UtilityEstimator,
    weights: HeadWeighting,
    planner: Planner,
    planned: Sequence[PlannedDocument],
    summary: AllocationSummary,
) -> AllocationContent:
    """The content of the artifact."""
    tables = planner.calibration
    return AllocationContent(
        info=AllocationInfo(
            model=capture.model,
            architecture=capture.architecture,
            model_digest=capture.model_digest,
            n_layers=capture.n_layers,
            n_q_heads=capture.n_q_heads,
            n_kv_heads=capture.n_kv_heads,
            head_dim=capture.head_dim,
            rope=capture.rope,
            page_size=options.page_size,
            budget=options.budget,
            horizon=options.horizon,
            window=options.window,
            utility={
                "name": estimator.name,
                "description": estimator.description,
                "is_ceiling": estimator.is_ceiling,
                "signals": estimator_signals(estimator),
            },
            is_calibrated=tables is not None,
            drop_coefficient=summary.drop_coefficient,
            drop_coefficient_source=summary.drop_coefficient_source,
            weights_source=weights.source,
            rounding_rule=ROUNDING_RULE,
            pin_first=options.pin_first,
            pin_last=options.pin_last,
            no_drop=options.no_drop,
        ),
        layers=capture.layers,
        frames=frames,
        tiers=planner.layout.tiers,
        quotas=planner.policy_for(planned[0].measured.n_context).fractions,
        quota_fit=_quota_fit(planner),
        head_weights=weights.values,
        drop_coefficients=planner.coefficients.drop,
        code_coefficients=planner.coefficients.code,
        score_arrays=estimator_arrays(estimator),
        calibration=None
        if tables is None
        else CalibrationArrays(tables.starts, tables.log_scores, tables.log_values),
        plans=tuple(_stored(document) for document in planned),
        tables={
            "heads": (HeadMix, summary.heads),
            "agreement": (LayerAgreement, summary.agreement),
            "positions": (PositionRow, summary.discovery.positions),
            "sinks": (SinkRow, summary.discovery.sinks),
            "comparisons": (ComparisonRow, _comparisons(summary)),
        },
    )


def _quota_fit(planner: Planner) -> QuotaFitArrays:
    fit = planner.quotas
    assert isinstance(fit, QuotaFit)
    return QuotaFitArrays(fit.pages, fit.prices.rates, fit.prices.drop, fit.prices.code)


def _stored(document: PlannedDocument) -> StoredPlan:
    info, laid_out = document.measured.info, document.plan.laid_out
    return StoredPlan(
        info=PlanInfo(
            index=info.index,
            name=info.name,
            split=info.split,
            text_sha256=info.text_sha256,
            n_tokens=info.n_tokens,
            n_context=document.measured.n_context,
            budget_bytes=document.budget.n_bytes,
            codes_bytes=laid_out.codes,
            padding_bytes=laid_out.padding,
            page_table_bytes=laid_out.page_table,
            positions_bytes=laid_out.positions,
            fixed_table_bytes=laid_out.fixed_tables,
            cost=document.plan.cost,
            dual_bound=document.solution.dual_bound,
            multiplier=document.solution.multiplier,
            policy_cost=document.policy.cost,
            policy_bytes=document.policy.laid_out.total,
        ),
        # Option 0 drops; in the file -1 does, and the tiers count from 0.
        tier_of_token=document.plan.option_of_token - np.int8(1),
        page_of_token=document.plan.page_of_token,
        policy_tier_of_token=document.policy.option_of_token - np.int8(1),
    )


def _comparisons(summary: AllocationSummary) -> tuple[ComparisonRow, ...]:
    rows = []
    for plan in (*summary.plans, *summary.checks):
        entries = [("plan", "per page", plan.cost, plan.laid_out.total, plan.measured)]
        entries += [
            (row.name, row.tier, row.cost, row.laid_out_bytes, row.measured)
            for row in plan.baselines
        ]
        rows += [
            ComparisonRow(
                plan.name,
                plan.split,
                name,
                tier,
                cost,
                n_bytes,
                float("nan") if measured is None else measured,
            )
            for name, tier, cost, n_bytes, measured in entries
        ]
    return tuple(rows)
