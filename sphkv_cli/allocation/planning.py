"""From measured documents to plans: calibrate, cut pages, solve, fit the policy and apply it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sphkv_cli.allocation.baselines import Baseline, best_uniform
from sphkv_cli.allocation.budget import Budget, ResolvedBudget
from sphkv_cli.allocation.calibration import QUANTITIES, CalibrationTables, fit_tables
from sphkv_cli.allocation.layout import LaidOutBytes, PageLayout
from sphkv_cli.allocation.measure import MeasuredDocument
from sphkv_cli.allocation.page_costs import (
    Coefficients,
    DocumentCosts,
    Utilities,
    document_costs,
    option_of_token,
    order_by_score,
    page_of_token,
    plan_cost,
)
from sphkv_cli.allocation.policy import QuotaPolicy, fit_quotas
from sphkv_cli.allocation.solver import Solution, solve


@dataclass(frozen=True)
class Placement:
    """Options of pages and tokens, with predicted cost and bytes.

    option_of_page: (n_layers, n_kv_heads, n_pages), by falling score; option_of_token,
    page_of_token: (n_layers, n_kv_heads, n_context).
    """

    option_of_page: NDArray[np.int8]
    option_of_token: NDArray[np.int8]
    page_of_token: NDArray[np.int32]
    cost: float
    laid_out: LaidOutBytes


@dataclass(frozen=True)
class PlannedDocument:
    """One document, planned three ways and compared with two baselines.

    costs: predicted; order: (n_layers, n_kv_heads, n_context) token at each rank; baselines: those
    that fit, by name.
    """

    measured: MeasuredDocument
    budget: ResolvedBudget
    costs: DocumentCosts
    order: NDArray[np.int64]
    solution: Solution
    plan: Placement
    policy: Placement
    baselines: dict[str, Baseline]

    @property
    def n_pages(self) -> int:
        """Pages of one KV head."""
        return int(self.costs.pages.shape[2])


@dataclass(frozen=True)
class Planner:
    """Everything frozen by the fit documents.

    calibration: None believes the window's own damage (or, for the oracle, the true future).
    """

    layout: PageLayout
    budget: Budget
    coefficients: Coefficients
    calibration: CalibrationTables | None
    is_ceiling: bool
    policy: QuotaPolicy

    @staticmethod
    def fit(
        documents: Sequence[MeasuredDocument],
        layout: PageLayout,
        budget: Budget,
        *,
        coefficients: Coefficients,
        calibrate: bool,
        is_ceiling: bool,
    ) -> "Planner":
        """Fit calibration tables and quotas on the fit documents (measured with their horizon)."""
        tables = None
        if calibrate and not is_ceiling:
            futures = []
            for document in documents:
                assert document.horizon is not None
                futures.append({name: getattr(document.horizon, name) for name in QUANTITIES})
            tables = fit_tables([document.scores for document in documents], futures)
        nothing = np.zeros((layout.n_layers, layout.n_kv_heads, len(layout.tiers)))
        bare = Planner(layout, budget, coefficients, tables, is_ceiling, QuotaPolicy(nothing))
        return bare.priced_at(coefficients, documents)

    def priced_at(
        self, coefficients: Coefficients, documents: Sequence[MeasuredDocument]
    ) -> "Planner":
        """The same at other prices, and quotas fitted anew on the fit documents; without
        documents the quotas stay."""
        priced = replace(self, coefficients=coefficients)
        if not documents:
            return priced
        plans = [priced.solved(document).option_of_page for document in documents]
        return replace(priced, policy=fit_quotas(plans, len(self.layout.option_names)))

    def solved(self, document: MeasuredDocument) -> Placement:
        """The solver's plan alone; raises as `plan`."""
        return self._solve(document)[-1]

    def utilities(self, document: MeasuredDocument) -> Utilities:
        """Expected future damage per token."""
        if self.is_ceiling:
            assert document.horizon is not None
            return document.horizon
        if self.calibration is None:
            return document.window
        # Out of every future query's reach the table does not apply: such a token costs nothing.
        reached = document.scores > 0
        return Utilities(
            *(self.calibration.expected(document.scores, name) * reached for name in QUANTITIES)
        )

    def plan(self, document: MeasuredDocument) -> PlannedDocument:
        """Solve one document and put the frozen policy and the baselines beside it.

        Raises:
            UsageError: the budget is below the metadata or above the dense cache of this document.
        """
        budget, costs, order, solution, plan = self._solve(document)
        pages_budget = budget.n_bytes - self.layout.overhead_bytes()
        quotas = self.policy.apply(costs.pages.shape[2], self.layout.option_bytes(), pages_budget)
        return PlannedDocument(
            document,
            budget,
            costs,
            order,
            solution,
            plan,
            self._place(quotas, order, costs),
            self._baselines(costs, budget.n_bytes),
        )

    def _baselines(self, costs: DocumentCosts, budget_bytes: int) -> dict[str, Baseline]:
        found = {
            name: best_uniform(costs.tokens, self.layout, budget_bytes, sink_page=sink_page)
            for name, sink_page in (("uniform", False), ("uniform + sink page", True))
        }
        return {name: baseline for name, baseline in found.items() if baseline is not None}

    def true_costs(self, document: MeasuredDocument) -> DocumentCosts:
        """Costs by the true future, on the same pages."""
        assert document.horizon is not None
        return self._costs(document, document.horizon)

    def _costs(self, document: MeasuredDocument, utilities: Utilities) -> DocumentCosts:
        order = order_by_score(document.scores)
        return document_costs(
            document.errors, utilities, self.coefficients, order, self.layout.page_size
        )

    def _solve(
        self, document: MeasuredDocument
    ) -> tuple[ResolvedBudget, DocumentCosts, NDArray[np.int64], Solution, Placement]:
        layout, n_context = self.layout, document.n_context
        budget = self.budget.resolve(layout.n_coordinates(n_context))
        budget.check(
            minimum_bytes=layout.overhead_bytes(),
            dense_bytes=layout.dense_bytes(n_context),
            document=f"document {document.info.name!r}",
        )
        costs = self._costs(document, self.utilities(document))
        pages = costs.pages
        sizes = np.broadcast_to(layout.option_bytes()[:, None, None, :], pages.shape)
        solution = solve(
            pages.reshape(-1, pages.shape[-1]),
            sizes.reshape(-1, pages.shape[-1]),
            budget.n_bytes - layout.overhead_bytes(),
        )
        option_of_page = solution.plan.option_of_item.reshape(pages.shape[:3])
        order = order_by_score(document.scores)
        return budget, costs, order, solution, self._place(option_of_page, order, costs)

    def _place(
        self, option_of_page: NDArray[np.int8], order: NDArray[np.int64], costs: DocumentCosts
    ) -> Placement:
        pages = page_of_token(order, self.layout.page_size)
        return Placement(
            option_of_page,
            option_of_token(option_of_page, pages),
            pages,
            plan_cost(costs.pages, option_of_page),
            self.layout.measure(option_of_page, order.shape[-1]),
        )
