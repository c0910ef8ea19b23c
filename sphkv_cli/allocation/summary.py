"""From planned and checked documents to the rows that `allocate` prints and stores."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sphkv_cli.allocation.agreement import LayerAgreement, MeasuredErrors, layer_agreement
from sphkv_cli.allocation.estimators import UtilityEstimator
from sphkv_cli.allocation.options import (
    DEFAULT_DROP_COEFFICIENT,
    DROP_COEFFICIENT_SOURCE,
    HEAD_WEIGHT_SOURCES,
    AllocateOptions,
)
from sphkv_cli.allocation.page_costs import DocumentCosts
from sphkv_cli.allocation.planning import PlannedDocument, Planner
from sphkv_cli.allocation.reading import read_summary
from sphkv_cli.allocation.result import AllocationSummary, BaselineRow, DocumentPlan, HeadMix


@dataclass(frozen=True)
class CheckedDocument:
    """A planned document whose future was measured; true_costs: as `Planner.true_costs`."""

    planned: PlannedDocument
    errors: MeasuredErrors
    true_costs: DocumentCosts

    @property
    def is_select(self) -> bool:
        return self.planned.measured.info.split == "select"


def summarise(
    options: AllocateOptions,
    planner: Planner,
    estimator: UtilityEstimator,
    planned: Sequence[PlannedDocument],
    checked: Sequence[CheckedDocument],
) -> AllocationSummary:
    """Everything that is said about an allocation, sentences included."""
    plans = tuple(_document_plan(planner, document, None) for document in planned)
    checks = tuple(_document_plan(planner, c.planned, c.errors) for c in checked)
    agreement = _agreement(checked)
    return AllocationSummary(
        budget=options.budget,
        utility=f"{estimator.name}: {estimator.description}",
        utility_is_ceiling=estimator.is_ceiling,
        is_calibrated=planner.calibration is not None,
        drop_coefficient=options.drop_coefficient,
        drop_coefficient_source=drop_coefficient_source(options),
        weights=HEAD_WEIGHT_SOURCES[options.head_weights],
        page_size=options.page_size,
        horizon=options.horizon,
        window=options.window,
        options=planner.layout.option_names,
        option_bytes=tuple(int(size) for size in planner.layout.option_bytes()[0]),
        plans=plans,
        checks=checks,
        check_split="select" if checked[0].is_select else "fit",
        heads=_head_mixes(planner, planned),
        agreement=agreement,
        reading=read_summary(estimator, plans, checks, agreement, options.drop_coefficient),
    )


def drop_coefficient_source(options: AllocateOptions) -> str:
    """Where c_drop comes from."""
    if options.drop_coefficient == DEFAULT_DROP_COEFFICIENT:
        return DROP_COEFFICIENT_SOURCE
    return "given with --drop-coefficient"


def _document_plan(
    planner: Planner, document: PlannedDocument, errors: MeasuredErrors | None
) -> DocumentPlan:
    layout, plan, budget = planner.layout, document.plan, document.budget

    def measured(name: str) -> float | None:
        return None if errors is None else float(errors.plans[name].sum())

    rows = [("policy", "frozen quotas", document.policy.cost, document.policy.laid_out.total)]
    rows += [
        (name, baseline.describe(layout), baseline.cost, baseline.laid_out.total)
        for name, baseline in document.baselines.items()
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
    quotas = planner.policy.fractions
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


def _agreement(checked: Sequence[CheckedDocument]) -> tuple[LayerAgreement, ...]:
    return layer_agreement(
        [check.planned.measured for check in checked],
        [check.errors for check in checked],
        [check.planned.costs.pages for check in checked],
        [check.true_costs.pages for check in checked],
        [check.planned.plan.option_of_token for check in checked],
    )
