"""From measured documents to plans: calibrate, cut pages, solve, fit the policy and apply it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sphkv_cli.allocation.baselines import Baseline, best_uniform
from sphkv_cli.allocation.budget import Budget, ResolvedBudget
from sphkv_cli.allocation.calibration import QUANTITIES, CalibrationTables, fit_tables
from sphkv_cli.allocation.layout import LaidOutBytes, PageLayout
from sphkv_cli.allocation.measure import MeasuredDocument
from sphkv_cli.allocation.page_costs import (
    Utilities,
    option_of_token,
    order_by_score,
    page_of_token,
    page_option_costs,
    plan_cost,
    token_option_costs,
)
from sphkv_cli.allocation.policy import QuotaPolicy, fit_quotas
from sphkv_cli.allocation.solver import Solution, solve

Float = NDArray[np.float64]


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

    token_costs: (n_options, n_layers, n_kv_heads, n_context) predicted; page_costs: (n_layers,
    n_kv_heads, n_pages, n_options); order: token at each rank; baselines: those that fit, by name.
    """

    measured: MeasuredDocument
    budget: ResolvedBudget
    token_costs: Float
    page_costs: Float
    order: NDArray[np.int64]
    solution: Solution
    plan: Placement
    policy: Placement
    baselines: dict[str, Baseline]

    @property
    def n_pages(self) -> int:
        """Pages of one KV head."""
        return int(self.page_costs.shape[2])


@dataclass(frozen=True)
class Planner:
    """Everything frozen by the fit documents.

    calibration: None believes the window's own damage (or, for the oracle, the true future).
    """

    layout: PageLayout
    budget: Budget
    drop_coefficient: float
    calibration: CalibrationTables | None
    is_ceiling: bool
    policy: QuotaPolicy

    @staticmethod
    def fit(
        documents: Sequence[MeasuredDocument],
        layout: PageLayout,
        budget: Budget,
        *,
        drop_coefficient: float,
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
        n_options = len(layout.option_names)
        nothing = QuotaPolicy(np.zeros((layout.n_layers, layout.n_kv_heads, n_options - 1)))
        bare = Planner(layout, budget, drop_coefficient, tables, is_ceiling, nothing)
        plans = [bare._solve(document)[-1] for document in documents]
        quotas = fit_quotas([plan.option_of_page for plan in plans], n_options)
        return Planner(layout, budget, drop_coefficient, tables, is_ceiling, quotas)

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
        budget, token_costs, page_costs, order, solution, plan = self._solve(document)
        pages_budget = budget.n_bytes - self.layout.overhead_bytes()
        quotas = self.policy.apply(page_costs.shape[2], self.layout.option_bytes(), pages_budget)
        return PlannedDocument(
            document,
            budget,
            token_costs,
            page_costs,
            order,
            solution,
            plan,
            self._place(quotas, order, token_costs),
            self._baselines(token_costs, budget.n_bytes),
        )

    def _baselines(self, token_costs: Float, budget_bytes: int) -> dict[str, Baseline]:
        found = {
            name: best_uniform(token_costs, self.layout, budget_bytes, sink_page=sink_page)
            for name, sink_page in (("uniform", False), ("uniform + sink page", True))
        }
        return {name: baseline for name, baseline in found.items() if baseline is not None}

    def true_costs(self, document: MeasuredDocument) -> Float:
        """(n_options, n_layers, n_kv_heads, n_context) costs by the true future."""
        assert document.horizon is not None
        return token_option_costs(document.errors, document.horizon, self.drop_coefficient)

    def _solve(
        self, document: MeasuredDocument
    ) -> tuple[ResolvedBudget, Float, Float, NDArray[np.int64], Solution, Placement]:
        layout, n_context = self.layout, document.n_context
        budget = self.budget.resolve(layout.n_coordinates(n_context))
        budget.check(
            minimum_bytes=layout.overhead_bytes(),
            dense_bytes=layout.dense_bytes(n_context),
            document=f"document {document.info.name!r}",
        )
        costs = token_option_costs(document.errors, self.utilities(document), self.drop_coefficient)
        order = order_by_score(document.scores)
        pages = page_option_costs(costs, order, layout.page_size)
        n_options = pages.shape[-1]
        sizes = np.broadcast_to(layout.option_bytes()[:, None, None, :], pages.shape)
        solution = solve(
            pages.reshape(-1, n_options),
            sizes.reshape(-1, n_options),
            budget.n_bytes - layout.overhead_bytes(),
        )
        option_of_page = solution.plan.option_of_item.reshape(pages.shape[:3])
        placement = self._place(option_of_page, order, costs)
        return budget, costs, pages, order, solution, placement

    def _place(
        self, option_of_page: NDArray[np.int8], order: NDArray[np.int64], token_costs: Float
    ) -> Placement:
        pages = page_of_token(order, self.layout.page_size)
        options = option_of_token(option_of_page, pages)
        return Placement(
            option_of_page,
            options,
            pages,
            float(plan_cost(token_costs, options).sum()),
            self.layout.measure(option_of_page, order.shape[-1]),
        )
