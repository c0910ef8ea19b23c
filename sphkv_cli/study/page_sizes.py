"""What pages cost beside codes: padding, page table and positions at 16, 32 and 64 tokens a page.

The fit documents' measurements are shared; order, pages, plan and quotas are made for each size.
Judge documents are planned from their context alone.  Source: ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sphkv_cli.allocation.budget import Budget
from sphkv_cli.allocation.layout import order_tiers
from sphkv_cli.allocation.measure import MeasuredDocument
from sphkv_cli.allocation.options import PAGE_SIZES
from sphkv_cli.allocation.planning import Planner
from sphkv_cli.blocks import Table
from sphkv_cli.errors import UsageError
from sphkv_cli.plots.figures import Figure, PlotPanel, Series
from sphkv_cli.study.inputs import StudyInputs
from sphkv_cli.study.result import StudyResult
from sphkv_cli.study.window_run import window_run

_COLUMNS = (
    "budget", "page size", "pages", "laid-out b", "codes %", "padding %", "page table %",
    "positions %", "fixed tables %", "plan cost", "policy cost", "largest gap",
)  # fmt: skip
_LINES = ("codes", "padding", "page_table", "positions", "fixed_tables")


@dataclass(frozen=True)
class _Row:
    """One page size at one budget; shares: of the laid-out bytes, as `_LINES`; costs: predicted."""

    budget: str
    page_size: int
    n_pages: int
    shares: tuple[float, ...]
    rate: float
    plan_cost: float
    policy_cost: float
    gap: float


def run(inputs: StudyInputs) -> StudyResult:
    """Plan the judge documents at every page size and budget.

    Raises:
        UsageError: no capture or codebooks, or a budget that cannot be laid out.
    """
    fit, budgets = window_run(inputs), inputs.options.budgets
    planner, fitted = fit.fit()
    judged = [fit.measure(info) for info in inputs.documents("judge")]
    rows = [
        _row(_sized(planner, size, budget, fitted), budget, judged)
        for budget in budgets
        for size in PAGE_SIZES
    ]
    return StudyResult(
        tables=(_table(rows),),
        figures=(_figure(rows),),
        reading=_reading(rows),
        conditions=(
            f"{len(judged)} judge documents of {fit.capture.model}, contexts of "
            f"{judged[0].n_context} tokens; score {fit.estimator.name}, window "
            f"{fit.options.window}, a drop at 8x its sum.",
            "Shares are of all laid-out bytes; costs are predicted, relative to pages of 32.",
        ),
    )


def _sized(
    planner: Planner, page_size: int, budget: str, fitted: Sequence[MeasuredDocument]
) -> Planner:
    layout = planner.layout
    tiers = order_tiers(layout.tiers, layout.head_dim, page_size)
    if tiers != layout.tiers:
        raise UsageError(
            f"the order of the tiers' bytes is another at pages of {page_size} tokens",
            "leave out tiers of nearly the same bytes",
        )
    sized = replace(
        planner,
        layout=replace(layout, page_size=page_size),
        budget=Budget.parse(budget),
    )
    return sized.refitted(fitted, fitted[0].n_context)


def _row(planner: Planner, budget: str, documents: Sequence[MeasuredDocument]) -> _Row:
    planned = [planner.plan(document) for document in documents]
    totals = [sum(getattr(one.plan.laid_out, line) for one in planned) for line in _LINES]
    n_bytes = sum(totals)
    n_coordinates = sum(planner.layout.n_coordinates(one.measured.n_context) for one in planned)
    return _Row(
        budget,
        planner.layout.page_size,
        sum(one.plan.option_of_page.size for one in planned),
        tuple(total / n_bytes for total in totals),
        8 * n_bytes / n_coordinates,
        sum(one.plan.cost for one in planned),
        sum(one.policy.cost for one in planned),
        max(one.solution.gap for one in planned),
    )


def _table(rows: Sequence[_Row]) -> Table:
    middle = {row.budget: row.plan_cost for row in rows if row.page_size == 32}
    return Table(
        "Laid-out bytes by purpose",
        _COLUMNS,
        [
            (
                row.budget,
                row.page_size,
                row.n_pages,
                row.rate,
                *(100 * share for share in row.shares),
                row.plan_cost / middle[row.budget],
                row.policy_cost / middle[row.budget],
                row.gap,
            )
            for row in rows
        ],
    )


def _figure(rows: Sequence[_Row]) -> Figure:
    budgets = list(dict.fromkeys(row.budget for row in rows))

    def series(value: str) -> list[Series]:
        found = []
        for budget in budgets:
            of_budget = [row for row in rows if row.budget == budget]
            y = [
                1 - row.shares[0] if value == "overhead" else row.plan_cost / of_budget[1].plan_cost
                for row in of_budget
            ]
            found.append(Series(budget, [row.page_size for row in of_budget], y, style="both"))
        return found

    return Figure(
        "page-sizes",
        "What is not codes, and what a plan costs, by tokens per page.",
        [
            PlotPanel("Not codes", "tokens per page", "share of bytes", series("overhead")),
            PlotPanel("Predicted cost", "tokens per page", "over pages of 32", series("cost")),
        ],
    )


def _reading(rows: Sequence[_Row]) -> tuple[str, str]:
    padding = {s: max(r.shares[1] for r in rows if r.page_size == s) for s in PAGE_SIZES}
    table = {s: max(r.shares[2] for r in rows if r.page_size == s) for s in PAGE_SIZES}
    first = "; ".join(
        f"pages of {size}: padding at most {100 * padding[size]:.2g} %, page table "
        f"{100 * table[size]:.2g} %"
        for size in PAGE_SIZES
    )
    middle = {row.budget: row.plan_cost for row in rows if row.page_size == 32}
    ratio = {
        size: float(
            np.exp(
                np.mean(
                    [
                        np.log(row.plan_cost / middle[row.budget])
                        for row in rows
                        if row.page_size == size
                    ]
                )
            )
        )
        for size in PAGE_SIZES
    }
    second = (
        f"Plans on pages of 16 are predicted to cost {ratio[16]:.2f}x those on pages of 32, on "
        f"pages of 64 {ratio[64]:.2f}x."
    )
    return first[0].upper() + first[1:] + ".", second
