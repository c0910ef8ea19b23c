"""From planned and checked documents to the rows that `allocate` prints and stores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sphkv_cli.allocation.agreement import LayerAgreement, MeasuredErrors, layer_agreement
from sphkv_cli.allocation.coherence import CODE_START, DROP_START
from sphkv_cli.allocation.discovery import Discovery
from sphkv_cli.allocation.estimators import UtilityEstimator
from sphkv_cli.allocation.head_weights import HeadWeighting
from sphkv_cli.allocation.options import AllocateOptions
from sphkv_cli.allocation.page_costs import DocumentCosts, plan_cost
from sphkv_cli.allocation.planning import Placement, PlannedDocument, Planner
from sphkv_cli.allocation.quota_fit import QuotaFit
from sphkv_cli.allocation.reading import read_summary
from sphkv_cli.allocation.result import AllocationSummary, BaselineRow, DocumentPlan, HeadMix

DROP_CONTROLS = {"drops at their sum": 1.0, "drops at 8x their sum": 8.0}
"""Plans that price drops by a constant, beside the fitted ones: what the fit is worth."""


@dataclass(frozen=True)
class CheckedDocument:
    """A planned document whose future was measured.

    true_costs: as `Planner.true_costs`; controls: plans made otherwise, by name, also measured.
    """

    planned: PlannedDocument
    errors: MeasuredErrors
    true_costs: DocumentCosts
    controls: Mapping[str, Placement]

    @property
    def is_select(self) -> bool:
        return self.planned.measured.info.split == "select"


def summarise(
    options: AllocateOptions,
    planner: Planner,
    estimator: UtilityEstimator,
    weights: HeadWeighting,
    planned: Sequence[PlannedDocument],
    checked: Sequence[CheckedDocument],
) -> AllocationSummary:
    """Everything that is said about an allocation, sentences included."""
    plans = tuple(_document_plan(planner, document, None, {}) for document in planned)
    checks = tuple(_document_plan(planner, c.planned, c.errors, c.controls) for c in checked)
    agreement = _agreement(planner, checked)
    discovery = Discovery.of_plans(
        planner.layout,
        [document.measured.info.name for document in planned],
        [document.plan.option_of_token for document in planned],
    )
    return AllocationSummary(
        budget=options.budget,
        utility=f"{estimator.name}: {estimator.description}",
        utility_is_ceiling=estimator.is_ceiling,
        is_calibrated=planner.calibration is not None,
        drop_coefficient=_geometric_mean(planner.coefficients.drop),
        drop_coefficient_range=_range(planner.coefficients.drop),
        code_coefficient=_geometric_mean(planner.coefficients.code),
        code_coefficient_range=_range(planner.coefficients.code),
        code_coefficient_source=_source(
            options.code_coefficient, "code", planner.coefficients.code, CODE_START
        ),
        drop_coefficient_source=_source(
            options.drop_coefficient, "drop", planner.coefficients.drop, DROP_START
        ),
        weights=weights.source,
        pins=options.pins.describe(),
        price_rates=tuple(planner.quotas.prices.rates)
        if isinstance(planner.quotas, QuotaFit)
        else (),
        page_size=options.page_size,
        horizon=options.horizon,
        window=options.window,
        options=planner.layout.option_names,
        option_bytes=tuple(int(size) for size in planner.layout.option_bytes()[0]),
        plans=plans,
        checks=checks,
        check_split="select" if checked[0].is_select else "fit",
        heads=_head_mixes(planner, planned),
        discovery=discovery,
        agreement=agreement,
        reading=read_summary(estimator, plans, checks, agreement, discovery),
    )


def _source(given: float | None, kind: str, values: NDArray[np.float64], start: float) -> str:
    """Where a coefficient, `values` of all heads, comes from; start: where its fits begin."""
    if given is None and (values == start).all():
        done = {"drop": "dropped", "code": "coded"}[kind]
        return f"where fits start: plans of the fit documents {done} nothing to fit it on"
    if given is None:
        return "fitted per layer and KV head on the fit documents"
    return f"given with --{kind}-coefficient"


def _geometric_mean(values: NDArray[np.float64]) -> float:
    return float(np.exp(np.log(values).mean()))


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _document_plan(
    planner: Planner,
    document: PlannedDocument,
    errors: MeasuredErrors | None,
    controls: Mapping[str, Placement],
) -> DocumentPlan:
    layout, plan, budget = planner.layout, document.plan, document.budget

    def measured(name: str) -> float | None:
        return None if errors is None else float(errors.plans[name].sum())

    rows = [("policy", "frozen quotas", document.policy.cost, document.policy.laid_out.total)]
    rows += [
        (name, baseline.describe(layout), baseline.cost, baseline.laid_out.total)
        for name, baseline in document.baselines.items()
    ]
    rows += [
        (
            name,
            "per page",
            plan_cost(document.costs.pages, control.option_of_page),
            control.laid_out.total,
        )
        for name, control in controls.items()
    ]
    n_options = len(layout.option_names)
    counts = np.bincount(plan.option_of_page.ravel(), minlength=n_options)
    n_context = document.measured.n_context
    return DocumentPlan(
        name=document.measured.info.name,
        split=document.measured.info.split,
        n_context=n_context,
        n_pages=plan.option_of_page.size,
        budget_bytes=budget.n_bytes,
        budget_bits_per_coordinate=budget.bits_per_coordinate,
        budget_fraction=budget.fraction,
        laid_out=plan.laid_out,
        laid_out_rate=8 * plan.laid_out.total / layout.n_coordinates(n_context),
        cost=plan.cost,
        dual_bound=document.solution.dual_bound,
        gap=document.solution.gap,
        multiplier=document.solution.multiplier,
        uniform_won=document.solution.is_uniform,
        tier_mix=tuple(float(share) for share in counts / counts.sum()),
        baselines=tuple(
            BaselineRow(
                name,
                tier,
                cost,
                cost / plan.cost if plan.cost > 0 else float("nan"),
                n_bytes,
                measured(name),
            )
            for name, tier, cost, n_bytes in rows
        ),
        measured=measured("plan"),
    )


def _head_mixes(planner: Planner, documents: Sequence[PlannedDocument]) -> tuple[HeadMix, ...]:
    layout = planner.layout
    n_options = len(layout.option_names)
    sizes = layout.option_bytes()
    quotas = planner.policy_for(documents[0].measured.n_context).fractions
    rows = []
    for layer, kv_head in np.ndindex(layout.n_layers, layout.n_kv_heads):
        pages = [document.plan.option_of_page[layer, kv_head] for document in documents]
        counts = np.bincount(np.concatenate(pages), minlength=n_options)
        n_tokens = sum(document.measured.n_context for document in documents)
        rows.append(
            HeadMix(
                layer,
                kv_head,
                8 * float(counts @ sizes[layer]) / (2 * layout.head_dim * n_tokens),
                tuple(float(share) for share in counts / counts.sum()),
                tuple(float(share) for share in quotas[layer, kv_head]),
            )
        )
    return tuple(rows)


def _agreement(planner: Planner, checked: Sequence[CheckedDocument]) -> tuple[LayerAgreement, ...]:
    return layer_agreement(
        [check.planned.measured for check in checked],
        [check.errors for check in checked],
        [check.planned.costs.pages for check in checked],
        [check.true_costs.pages for check in checked],
        [check.planned.plan.option_of_token for check in checked],
        planner.coefficients,
    )
