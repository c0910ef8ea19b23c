"""What does it cost that precision never comes back, when a cache grows under its budget?

The pages of a judge context arrive in order of position, one page of every KV head at a time, in
bf16; `GrowingAllocation` keeps the budget after every step by demotions alone.  Three schedules:

    per token   so many bits per coordinate of what has arrived
    absolute    half of the bytes that the budget gives the whole context, from the start
    shrinking   per token, halved when half of the context has come

Beside it: the best plan that each step's own past allowed, and the best without a past, both by the
solver's dual bound on the same pages.  Costs are predicted; a page's cost is known when it is
sealed.  Source: ours.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sphkv_cli.allocation.budget import Budget
from sphkv_cli.allocation.measure import MeasuredDocument
from sphkv_cli.allocation.page_costs import document_costs
from sphkv_cli.allocation.planning import Planner
from sphkv_cli.allocation.solver import solve
from sphkv_cli.blocks import Table
from sphkv_cli.errors import UsageError
from sphkv_cli.growing.allocation import GrowingAllocation
from sphkv_cli.growing.bound import solve_under
from sphkv_cli.growing.schedule import BudgetSchedule
from sphkv_cli.plots.figures import Figure, PlotPanel, Series
from sphkv_cli.study.inputs import StudyInputs
from sphkv_cli.study.result import StudyResult
from sphkv_cli.study.window_run import window_run

_COLUMNS = (
    "schedule", "budget", "documents", "steps over budget", "worst over solver",
    "worst over bound", "end over free", "worst end", "demotions per step", "ms per step",
    "most ms",
)  # fmt: skip
SCHEDULES = ("per token", "absolute", "shrinking")


@dataclass(frozen=True)
class _Step:
    """After one step: tokens, bytes over budget (0 where it holds), and its cost over others.

    over_history, over_free: the dual bounds under its own past and without one; over_solver: the
    solver's plan under its own past (few pages at once leave the bound far below any plan).
    """

    n_tokens: int
    over_bytes: int
    over_history: float
    over_solver: float
    over_free: float
    n_demoted: int
    step_ms: float


@dataclass(frozen=True)
class _Run:
    document: str
    schedule: str
    budget: str
    steps: tuple[_Step, ...]


def run(inputs: StudyInputs) -> StudyResult:
    """Grow every judge document under every schedule.

    Raises:
        UsageError: no capture or codebooks, or a budget that cannot be laid out.
    """
    fit, budgets = window_run(inputs), inputs.options.budgets
    planner, _ = fit.fit()
    runs = [
        _grown(planner, document, schedule, budget)
        for document in (fit.measure(info) for info in inputs.documents("judge"))
        for budget in budgets
        for schedule in SCHEDULES
    ]
    return StudyResult(
        tables=(_table(runs),),
        figures=(_figure(runs),),
        reading=_reading(runs),
        conditions=(
            f"{fit.capture.model}; pages of {fit.options.page_size} tokens of every KV head, "
            f"sealed in order of position; score {fit.estimator.name}, window "
            f"{fit.options.window}, a drop at 8x its sum.",
            "Costs are predicted and over dual bounds, so what is printed is never too small; a "
            "step's time is that of its demotions, on one core.",
        ),
    )


def _grown(planner: Planner, document: MeasuredDocument, kind: str, budget: str) -> _Run:
    layout, n_context = planner.layout, document.n_context
    heads = (layout.n_layers, layout.n_kv_heads)
    order = np.broadcast_to(np.arange(n_context), (*heads, n_context))
    utilities = planner.utilities(document)
    costs = document_costs(
        document.errors, utilities, planner.coefficients, order, layout.page_size
    ).pages
    sizes = np.broadcast_to(layout.option_bytes()[:, None, :], (*heads, costs.shape[-1]))
    sizes = sizes.reshape(-1, costs.shape[-1])
    whole = Budget.parse(budget).resolve(layout.n_coordinates(n_context)).n_bytes
    whole -= layout.overhead_bytes()
    if whole <= 0:
        raise UsageError(f"the budget {budget} is below the fixed tables", "give a larger one")
    schedule = _schedule(kind, whole / n_context, whole, n_context)
    cache = GrowingAllocation(costs.shape[-1])
    steps = []
    for page in range(costs.shape[2]):
        n_tokens = min((page + 1) * layout.page_size, n_context)
        limit = schedule.budget_bytes(n_tokens)
        arrived = costs[:, :, page].reshape(-1, costs.shape[-1])
        ceilings = np.append(cache.options, np.full(len(arrived), costs.shape[-1] - 1))
        started = time.perf_counter()
        step = cache.append(arrived, sizes, limit)
        elapsed_ms = 1e3 * (time.perf_counter() - started)
        past = solve_under(cache.costs, cache.option_bytes, ceilings, limit)
        free = solve(cache.costs, cache.option_bytes, limit, n_threads=1).dual_bound
        steps.append(
            _Step(
                n_tokens,
                max(step.used_bytes - limit, 0),
                _ratio(step.cost, past.dual_bound),
                step.cost / past.plan.cost if past.plan.cost > 0 else 1.0,
                _ratio(step.cost, free),
                len(step.demotions),
                elapsed_ms,
            )
        )
    return _Run(document.info.name, kind, budget, tuple(steps))


def _schedule(kind: str, per_token: float, whole: int, n_context: int) -> BudgetSchedule:
    if kind == "absolute":
        # More per token than any page takes: only the limit counts.
        return BudgetSchedule(float(whole), at_most_bytes=whole // 2)
    factors = ((n_context // 2, 0.5),) if kind == "shrinking" else ()
    return BudgetSchedule(per_token, factors=factors)


def _ratio(cost: float, bound: float) -> float:
    # All pages dense: nothing is lost, and nothing could be less.
    return 1.0 if cost <= bound or cost == 0 else cost / max(bound, 1e-300)


def _table(runs: Sequence[_Run]) -> Table:
    rows = []
    for budget in dict.fromkeys(run.budget for run in runs):
        for schedule in SCHEDULES:
            of_kind = [one for one in runs if (one.budget, one.schedule) == (budget, schedule)]
            steps = [step for one in of_kind for step in one.steps]
            last = [one.steps[-1] for one in of_kind]
            rows.append(
                (
                    schedule,
                    budget,
                    len(of_kind),
                    sum(step.over_bytes > 0 for step in steps),
                    max(step.over_solver for step in steps),
                    max(step.over_history for step in steps),
                    float(np.exp(np.mean([np.log(step.over_free) for step in last]))),
                    max(step.over_free for step in last),
                    float(np.median([step.n_demoted for step in steps])),
                    float(np.median([step.step_ms for step in steps])),
                    max(step.step_ms for step in steps),
                )
            )
    return Table(
        "A cache that grows under its budget",
        _COLUMNS,
        rows,
    )


def _figure(runs: Sequence[_Run]) -> Figure:
    document = runs[0].document
    panels = []
    for schedule in SCHEDULES:
        series = [
            Series(
                one.budget,
                [step.n_tokens for step in one.steps],
                [step.over_free for step in one.steps],
            )
            for one in runs
            if (one.document, one.schedule) == (document, schedule)
        ]
        panels.append(PlotPanel(schedule, "tokens", "cost over the best without a past", series))
    return Figure("growing", f"Predicted cost as {document} grows.", panels, n_columns=3)


def _reading(runs: Sequence[_Run]) -> tuple[str, str]:
    steps = [step for one in runs for step in one.steps]
    over = sum(step.over_bytes > 0 for step in steps)
    worst = max(step.over_solver for step in steps)
    ends = {
        schedule: float(
            np.exp(
                np.mean(
                    [np.log(one.steps[-1].over_free) for one in runs if one.schedule == schedule]
                )
            )
        )
        for schedule in SCHEDULES
    }
    said = ", ".join(f"{value:.2f}x ({name})" for name, value in ends.items())
    return (
        f"The budget was exceeded after {over} of {len(steps)} steps, and the dearest step cost "
        f"{worst:.4f}x the solver's own plan for the pages and limits that its past left it.",
        f"At the end the predicted cost is {said} of the best plan without a past.",
    )
