"""What does a cache of so many laid-out bits per coordinate lose, by method?

A context is prefilled dense and coded once; the tokens after it read it (retention protocol).  The
allocation is fitted on the capture's fit documents (score, calibration, prices at a few budgets,
quotas at each); judge documents are placed from their context alone, but by the oracle.  Methods
and controls: `evaluation/retention_rows.py`; all spend the same laid-out bytes, fixed tables
included.  Source: ours; baselines as their papers have them (`published.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from sphkv_cli.allocation.budget import Budget
from sphkv_cli.allocation.coherence import CODE_START, DROP_START
from sphkv_cli.allocation.frozen import FrozenAllocation
from sphkv_cli.allocation.options import AllocateOptions
from sphkv_cli.allocation.planning import Planner
from sphkv_cli.allocation.stage import AllocationRun
from sphkv_cli.blocks import Table
from sphkv_cli.evaluation.copy_back import RecallScore, copy_back_prompts, copy_back_recall
from sphkv_cli.evaluation.recall_prompts import (
    PromptShape,
    RecallPrompt,
    encoder_of,
    start_tokens,
)
from sphkv_cli.evaluation.retention_bench import (
    CONTROL_SCORES,
    SHARES,
    Bench,
    BenchDocument,
    BenchRow,
    control_planners,
)
from sphkv_cli.evaluation.retention_rows import ORACLE, PLAN, POLICY, Controls, wanted_kinds
from sphkv_cli.plots.figures import Figure, PlotPanel, Series
from sphkv_cli.study.inputs import StudyInputs
from sphkv_cli.study.result import StudyResult

_COLUMNS = (
    "budget", "method", "laid-out b", "KL", "95 % low", "high", "KL p99", "perplexity ratio",
    "top-1", "output error", "its p99", "digits recalled", "predicted",
)  # fmt: skip


def run(inputs: StudyInputs) -> StudyResult:
    """Fit, place and judge.

    Raises:
        UsageError: no capture or codebooks, a budget that cannot be laid out.
        SphkvError: splits without documents, NaN or Inf in the capture.
    """
    options = inputs.options
    capture, codebooks = inputs.require_capture(), inputs.require_codebooks()
    asked = AllocateOptions(
        budget=options.middle_budget,
        horizon=options.horizon,
        window=options.window,
        seed=options.seed,
    )
    fit = AllocationRun.prepare(asked, capture, codebooks, inputs.progress)
    planner, fitted = fit.fit()
    kinds = wanted_kinds(options.rows)
    planners = _planners(planner, options.budgets, fitted[0].n_context)
    control_budget = options.budgets[(len(options.budgets) - 1) // 2]
    controls, no_weights = Controls({}), None
    model = inputs.judged_model
    if "control" in kinds:
        controls = control_planners(fit, planner, fitted)
        no_weights = _without_weights(inputs, asked, planners[control_budget], control_budget)
    bench = Bench(
        model,
        FrozenAllocation.fitted(fit, planner),
        planners,
        kinds,
        controls,
        (control_budget,),
        no_weights,
    )
    documents = [
        BenchDocument(
            info.name, torch.from_numpy(capture.token_ids(info)), info.n_tokens - asked.horizon
        )
        for info in inputs.documents("judge")
    ]
    prompts = _prompts(inputs, [document.token_ids for document in documents])
    inputs.progress.start("judging", None, "runs")
    dense = copy_back_recall(model, None, prompts) if prompts else None
    rows = bench.run(documents, prompts, inputs.progress)
    layout = planner.layout
    n_pages = layout.n_pages(min(document.n_context for document in documents))
    n_pages *= layout.n_layers * layout.n_kv_heads
    return StudyResult(
        tables=(_table(rows), _parts(rows), _goals(rows, n_pages)),
        figures=(_figure(rows),),
        reading=_reading(rows, dense),
        conditions=(
            f"{len(documents)} judge documents of {capture.model}, contexts of "
            f"{documents[0].n_context} tokens, the {asked.horizon} tokens after each are scored.",
            f"Window of {asked.window} queries, score {fit.estimator.name}, head weights "
            f"{fit.weights.source}; KL is the geometric mean over documents with its 95 % "
            "interval, p99 over all scored tokens, perplexity over dense perplexity.",
            "Output error is relative, per layer, head and query after the context, with all that "
            "comes before it dense; p99 is that of the worst document.",
            "Laid-out bits count codes, padding, page table, positions and fixed tables of the "
            "context; tokens after it stay dense and are not counted.",
            f"Controls stand at {control_budget}, calibrated on the same fit documents: "
            f"{', '.join(CONTROL_SCORES)}.",
        ),
    )


def _without_weights(
    inputs: StudyInputs, asked: AllocateOptions, planner: Planner, budget: str
) -> Bench:
    """The control without F: score and calibration fitted without it, prices as with it."""
    fit = AllocationRun.prepare(
        replace(
            asked, head_weights="none", drop_coefficient=DROP_START, code_coefficient=CODE_START
        ),
        inputs.require_capture(),
        inputs.require_codebooks(),
        inputs.progress,
    )
    fitted, _ = fit.fit()
    priced = replace(fitted, budget=planner.budget).priced_at(planner.coefficients)
    return Bench(
        inputs.judged_model,
        FrozenAllocation.fitted(fit, priced),
        {budget: priced},
        ("own",),
        Controls({}),
    )


def _planners(planner: Planner, budgets: Sequence[str], n_context: int) -> dict[str, Planner]:
    """Quotas and prices of every budget."""
    return {budget: planner.at(Budget.parse(budget), n_context) for budget in budgets}


def _prompts(inputs: StudyInputs, texts: Sequence[torch.Tensor]) -> tuple[RecallPrompt, ...]:
    """Copy-back prompts about as long as the judge documents, filled with their text."""
    from sphkv_cli.models.load import load_tokenizer
    from sphkv_cli.models.source import resolve_model

    if not inputs.options.recall_prompts:
        return ()
    name = inputs.model or inputs.require_capture().model
    tokenizer = load_tokenizer(resolve_model(name))
    shape = PromptShape(n_context=int(texts[0].numel()), start=start_tokens(tokenizer))
    filler = [int(token) for text in texts for token in text]
    return copy_back_prompts(
        encoder_of(tokenizer),
        filler,
        shape,
        n_prompts=inputs.options.recall_prompts,
        seed=inputs.seed,
    )


def _table(rows: Sequence[BenchRow]) -> Table:
    return Table(
        "Retention at equal laid-out bytes",
        _COLUMNS,
        [
            (
                found.budget,
                found.row.name,
                found.row.coded_laid_out_rate,
                found.row.kl_geometric.mean,
                found.row.kl_geometric.low,
                found.row.kl_geometric.high,
                found.row.kl_p99,
                found.row.perplexity_ratio.mean,
                found.row.top1.mean,
                None if found.output_error is None else found.output_error.mean,
                None if found.output_error is None else found.output_error.p99,
                None if found.recall is None else found.recall.digit_accuracy.mean,
                found.predicted,
            )
            for found in sorted(rows, key=lambda one: _order(one, rows))
        ],
        text_columns=2,
    )


def _parts(rows: Sequence[BenchRow]) -> Table:
    """What lies between policy, plan and oracle, and what the policy's bytes are."""
    body = []
    for budget in dict.fromkeys(one.budget for one in rows):
        policy, plan = (_found(rows, budget, name) for name in (POLICY, PLAN))
        body.append(
            (
                budget,
                _kl(rows, budget, POLICY) / _kl(rows, budget, PLAN),
                _kl(rows, budget, PLAN) / _kl(rows, budget, ORACLE),
                policy.predicted / plan.predicted,
                plan.gap,
                *(100 * share for share in policy.shares),
            )
        )
    return Table(
        "Policy, plan and oracle; where the policy's bytes go",
        (
            *("budget", "KL policy / plan", "KL plan / oracle", "predicted policy / plan"),
            *("largest gap", *(f"{name.replace('_', ' ')} %" for name in SHARES)),
        ),
        body,
    )


def _goals(rows: Sequence[BenchRow], n_pages: int) -> Table:
    """What a policy must keep to be worth freezing; of every budget the worst."""
    budgets = list(dict.fromkeys(one.budget for one in rows))

    def worst(of_budget: Callable[[str], float]) -> float:
        return max(of_budget(budget) for budget in budgets)

    def share(name: str) -> float:
        place = SHARES.index(name)
        return worst(lambda budget: 100 * _found(rows, budget, POLICY).shares[place])

    goals = (
        (
            "KL of the policy over that of the plan solved for each context",
            1.1,
            worst(lambda b: _kl(rows, b, POLICY) / _kl(rows, b, PLAN)),
        ),
        (
            "KL of the plan over that of the oracle, which sees the future",
            2.5,
            worst(lambda b: _kl(rows, b, PLAN) / _kl(rows, b, ORACLE)),
        ),
        (
            f"gap of the plan to the dual bound ({n_pages:,} pages)",
            1e-3,
            worst(lambda b: _found(rows, b, PLAN).gap),
        ),
        ("padding, % of the bytes", 1.0, share("padding")),
        ("page table, % of the bytes", 1.0, share("page_table")),
    )
    return Table(
        "Goals: at most, worst of the budgets",
        ("quantity", "at most", "measured", "verdict"),
        [
            (name, limit, found, "met" if found <= limit else "missed")
            for name, limit, found in goals
        ],
    )


def _order(row: BenchRow, rows: Sequence[BenchRow]) -> tuple[int, int]:
    """Budgets in the order given, own before published before controls."""
    budgets = list(dict.fromkeys(one.budget for one in rows))
    return budgets.index(row.budget), ("own", "published", "control").index(row.kind)


def _figure(rows: Sequence[BenchRow]) -> Figure:
    panels = []
    for title, kinds in (
        ("Ours and published", ("own", "published")),
        ("Ours and controls", ("own", "control")),
    ):
        names = dict.fromkeys(one.row.name for one in rows if one.kind in kinds)
        if kinds[1] not in {one.kind for one in rows}:
            continue
        series = []
        for name in names:
            found = sorted(
                (one.row for one in rows if one.row.name == name),
                key=lambda row: row.coded_laid_out_rate,
            )
            series.append(
                Series(
                    name,
                    [row.coded_laid_out_rate for row in found],
                    [row.kl_geometric.mean for row in found],
                    style="both",
                    emphasis=name == POLICY,
                )
            )
        panels.append(
            PlotPanel(title, "laid-out bits per coordinate", "KL, nats", series, y_scale="log")
        )
    if not panels:
        series = [
            Series(one.row.name, [one.row.coded_laid_out_rate], [one.row.kl_geometric.mean], "both")
            for one in rows
        ]
        panels = [PlotPanel("Ours", "laid-out bits per coordinate", "KL, nats", series)]
    return Figure("kl-by-bits", "KL of the next token against laid-out bits.", panels)


def _reading(rows: Sequence[BenchRow], dense: RecallScore | None) -> tuple[str, str]:
    factors, sentences = [], []
    for budget in dict.fromkeys(one.budget for one in rows):
        of_budget = {one.row.name: one for one in rows if one.budget == budget}
        published = [
            one
            for one in of_budget.values()
            if one.kind == "published" and not one.row.name.startswith("joint")
        ]
        policy = of_budget[POLICY].row.kl_geometric.mean
        if published:
            best = min(published, key=lambda one: one.row.kl_geometric.mean)
            factor = best.row.kl_geometric.mean / policy
            factors.append((factor, budget, best.row.name))
            sentences.append(f"{factor:.1f}x at {budget} (best other: {best.row.name})")
    ratios = [
        (
            _kl(rows, budget, POLICY) / _kl(rows, budget, PLAN),
            _kl(rows, budget, POLICY) / _kl(rows, budget, ORACLE),
        )
        for budget in dict.fromkeys(one.budget for one in rows)
    ]
    to_plan, to_oracle = (math.exp(np.log(column).mean()) for column in zip(*ratios, strict=True))
    first = (
        "Without a published method to compare with, the policy's KL stands alone."
        if not factors
        else f"KL of the best non-joint method over that of the frozen policy: "
        f"{'; '.join(sentences)}."
    )
    second = (
        f"The policy's KL is {to_plan:.2f}x that of the plan solved per prompt and "
        f"{to_oracle:.2f}x that of the oracle (geometric means over budgets)"
    )
    if dense is not None:
        usable = "" if dense.is_usable_control else ", so the probe proves little"
        second += f"; the dense model recalls {dense.digit_accuracy.mean:.2f} of digits{usable}"
    return first, second + "."


def _kl(rows: Sequence[BenchRow], budget: str, name: str) -> float:
    return max(_found(rows, budget, name).row.kl_geometric.mean, 1e-300)


def _found(rows: Sequence[BenchRow], budget: str, name: str) -> BenchRow:
    return next(one for one in rows if (one.budget, one.row.name) == (budget, name))
