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
from sphkv_cli.allocation.pins import Pins
from sphkv_cli.allocation.policy import QuotaPolicy
from sphkv_cli.allocation.quota_fit import BudgetPrices, QuotaFit, apply_quotas, solve_pages
from sphkv_cli.allocation.solver import Solution


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
    quotas: what they are fitted from, for any budget and length; or, of files that lack it, those
    of one budget, which are scaled.
    """

    layout: PageLayout
    budget: Budget
    coefficients: Coefficients
    calibration: CalibrationTables | None
    is_ceiling: bool
    quotas: QuotaFit | QuotaPolicy
    pins: Pins = Pins()  # noqa: RUF009  (it holds nothing that changes)

    @staticmethod
    def fit(
        documents: Sequence[MeasuredDocument],
        layout: PageLayout,
        budget: Budget,
        *,
        coefficients: Coefficients,
        calibrate: bool,
        is_ceiling: bool,
        pins: Pins | None = None,
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
        bare = Planner(
            layout, budget, coefficients, tables, is_ceiling, QuotaPolicy(nothing), pins or Pins()
        )
        return bare.refitted(documents, n_context=documents[0].n_context)

    def refitted(self, documents: Sequence[MeasuredDocument], n_context: int) -> "Planner":
        """The same with quotas fitted anew on measured documents; n_context: a usual one."""
        plain = np.ones_like(self.coefficients.drop)
        unpriced = replace(self, coefficients=Coefficients(plain, plain))
        pages = tuple(
            unpriced._costs(document, unpriced.utilities(document)).pages.astype(np.float32)
            for document in documents
        )
        rate = self.budget.resolve(self.layout.n_coordinates(n_context)).bits_per_coordinate
        return replace(self, quotas=QuotaFit(pages, BudgetPrices.of([(rate, self.coefficients)])))

    def priced_at(self, coefficients: Coefficients) -> "Planner":
        """The same at other prices of drops and codes."""
        return replace(self, coefficients=coefficients)

    def priced_by(self, found: Sequence[tuple[Budget, Coefficients]], n_context: int) -> "Planner":
        """The same with prices found at several budgets of contexts of n_context tokens."""
        assert isinstance(self.quotas, QuotaFit)
        n_coordinates = self.layout.n_coordinates(n_context)
        prices = BudgetPrices.of(
            [(b.resolve(n_coordinates).bits_per_coordinate, prices) for b, prices in found]
        )
        return replace(self, quotas=replace(self.quotas, prices=prices))

    def at(self, budget: Budget, n_context: int) -> "Planner":
        """The same for another budget of a context of n_context tokens: at the prices of that
        budget, where what they are fitted from is there."""
        if not isinstance(self.quotas, QuotaFit):
            return replace(self, budget=budget)
        rate = budget.resolve(self.layout.n_coordinates(n_context)).bits_per_coordinate
        return replace(self, budget=budget, coefficients=self.quotas.prices.at(rate))

    def policy_for(self, n_context: int) -> QuotaPolicy:
        """Quotas of contexts of n_context tokens, of the pages that are not pinned.

        Raises:
            InfeasibleBudgetError: the budget is below what must be kept.
        """
        if isinstance(self.quotas, QuotaPolicy):
            return self.quotas
        return self.quotas.quotas(
            self.layout, self.coefficients, self._pages_budget(n_context), n_context, self.pins
        )

    def options_of_pages(self, n_context: int) -> NDArray[np.int8]:
        """(n_layers, n_kv_heads, n_pages) option of each page by falling score, by the quotas.

        Raises:
            InfeasibleBudgetError: the budget is below what must be kept.
        """
        policy, budget = self.policy_for(n_context), self._pages_budget(n_context)
        return apply_quotas(policy, self.layout, budget, self.pins, n_context)

    def order(self, scores: NDArray[np.float64]) -> NDArray[np.int64]:
        """(.., n_context) token at each rank."""
        return order_by_score(self.pins.lifted(scores))

    def _pages_budget(self, n_context: int) -> int:
        resolved = self.budget.resolve(self.layout.n_coordinates(n_context))
        return resolved.n_bytes - self.layout.overhead_bytes()

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
        quotas = self.options_of_pages(document.n_context)
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
        order = self.order(document.scores)
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
        self.pins.require(layout, n_context, budget.n_bytes, f"document {document.info.name!r}")
        costs = self._costs(document, self.utilities(document))
        option_of_page, solution = solve_pages(
            costs.pages, layout, self._pages_budget(n_context), self.pins, n_context
        )
        order = self.order(document.scores)
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
