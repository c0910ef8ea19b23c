"""What a score is worth: the true cost of the plan that it leads to, against the oracle's plan.

    regret = true cost of the plan / true cost of the oracle's plan, at the same bytes

A score is calibrated on the fit documents, then orders, cuts and prices the pages of the others;
the true cost of what the solver chooses is that of the true future.  A layer's regret compares the
plans of that layer alone, given its share of the bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sphkv_cli.allocation.budget import Budget
from sphkv_cli.allocation.calibration import QUANTITIES, CalibrationTables, fit_tables
from sphkv_cli.allocation.estimator_names import ORACLE
from sphkv_cli.allocation.layout import PageLayout
from sphkv_cli.allocation.measure import MeasuredDocument
from sphkv_cli.allocation.page_costs import Coefficients, TierErrors, Utilities, plan_cost
from sphkv_cli.allocation.planning import Planner
from sphkv_cli.allocation.policy import QuotaPolicy
from sphkv_cli.study.utility_scores import ESTIMATORS, EXACT, ScoredDocument

Float = NDArray[np.float64]


@dataclass(frozen=True)
class PlanCosts:
    """Of one estimator's plans, geometric means over documents.

    predicted, true: cost over all layers; regret: true over the oracle's; layer_regret:
    (n_layers), each layer planned alone.
    """

    predicted: float
    true: float
    regret: float
    layer_regret: Float


@dataclass(frozen=True)
class _Costs:
    """(n_documents) each, and by layer (n_layers, n_documents)."""

    predicted: Float
    true: Float
    by_layer: Float


def compare_plans(
    fit: Sequence[ScoredDocument],
    others: Sequence[ScoredDocument],
    layout: PageLayout,
    budget: Budget,
    keys: Sequence[str],
    drop_coefficient: float,
) -> dict[tuple[str, str], PlanCosts]:
    """Costs by (keys, estimator), the oracle under exact keys included."""
    documents = [document.measured for document in others]
    oracle = _plan(documents, None, layout, budget, drop_coefficient)
    futures = []
    for document in fit:
        horizon = document.measured.horizon
        assert horizon is not None
        futures.append({name: getattr(horizon, name) for name in QUANTITIES})
    found = {(EXACT, ORACLE): _compared(oracle, oracle)}
    for kind in keys:
        for name in ESTIMATORS:
            tables = fit_tables([document.scores[kind, name] for document in fit], futures)
            scored = [document.with_scores(kind, name) for document in others]
            costs = _plan(scored, tables, layout, budget, drop_coefficient)
            found[kind, name] = _compared(costs, oracle)
    return found


def _plan(
    documents: Sequence[MeasuredDocument],
    tables: CalibrationTables | None,
    layout: PageLayout,
    budget: Budget,
    drop_coefficient: float,
) -> _Costs:
    """Plans by calibrated scores; without tables by the true future itself."""
    whole = [_costs(document, tables, layout, budget, drop_coefficient) for document in documents]
    by_layer = [
        [
            _costs(
                _one_layer(document, layer),
                None if tables is None else _table_of(tables, layer),
                replace(layout, stores_positions=layout.stores_positions[layer : layer + 1]),
                budget,
                drop_coefficient,
            )[1]
            for document in documents
        ]
        for layer in range(layout.n_layers)
    ]
    return _Costs(
        np.array([predicted for predicted, _ in whole]),
        np.array([true for _, true in whole]),
        np.array(by_layer),
    )


def _costs(
    document: MeasuredDocument,
    tables: CalibrationTables | None,
    layout: PageLayout,
    budget: Budget,
    drop_coefficient: float,
) -> tuple[float, float]:
    """Predicted and true cost of the plan of one document."""
    heads = (layout.n_layers, layout.n_kv_heads)
    planner = Planner(
        layout,
        budget,
        Coefficients.constant(heads, drop_coefficient),
        tables,
        tables is None,
        QuotaPolicy(np.zeros((*heads, len(layout.tiers)))),
    )
    plan = planner.solved(document)
    true = planner.true_costs(document)
    return plan.cost, plan_cost(true.pages, plan.option_of_page)


def _compared(costs: _Costs, oracle: _Costs) -> PlanCosts:
    def mean(values: Float) -> Float:
        logs = np.log(np.maximum(values, 1e-300)).mean(axis=-1)
        geometric: Float = np.exp(logs)
        return geometric

    return PlanCosts(
        float(mean(costs.predicted)),
        float(mean(costs.true)),
        float(mean(costs.true) / mean(oracle.true)),
        mean(costs.by_layer) / mean(oracle.by_layer),
    )


def _one_layer(document: MeasuredDocument, layer: int) -> MeasuredDocument:
    rows = slice(layer, layer + 1)
    assert document.horizon is not None
    horizon = Utilities(
        *(getattr(document.horizon, name)[rows] for name in ("key", "value", "drop"))
    )
    errors = document.errors
    return replace(
        document,
        errors=TierErrors(
            errors.key[:, rows], errors.value[:, rows], errors.key_format, errors.value_format
        ),
        scores=document.scores[rows],
        window=horizon,
        horizon=horizon,
    )


def _table_of(tables: CalibrationTables, layer: int) -> CalibrationTables:
    return replace(tables, starts=tables.starts[layer : layer + 1])
