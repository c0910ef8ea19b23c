"""`sphkv allocate` for people."""

from collections.abc import Sequence

from sphkv_cli.allocation.pins import NO_PINS
from sphkv_cli.allocation.result import AllocationResult, AllocationSummary, DocumentPlan
from sphkv_cli.blocks import Block, Line, Table, bytes_text, counted, times_text


def view(result: AllocationResult) -> tuple[Block, ...]:
    """Verdicts, then where the bytes went, the comparisons, the layers, and what was assumed."""
    summary = result.summary
    return (
        Line(f"{result.path}: {result.model}, {_budget(summary)}"),
        *(Line(f"- {sentence}") for sentence in summary.reading),
        Line(),
        _bytes(summary),
        _comparisons("Predicted cost at the same bytes", summary.plans),
        _comparisons(f"Measured on {summary.check_split} documents", summary.checks),
        _tiers(summary),
        _layers(summary),
        _positions(summary),
        *_sinks(summary),
        *(Line(text) for text in _assumptions(result)),
    )


def _budget(summary: AllocationSummary) -> str:
    first = summary.plans[0]
    return (
        f"budget {summary.budget} = {first.budget_bits_per_coordinate:.4g} bits per coordinate = "
        f"{100 * first.budget_fraction:.4g} % of bf16 = {first.budget_bytes:,} bytes for "
        f"{first.n_context} tokens"
    )


def _bytes(summary: AllocationSummary) -> Table:
    return Table(
        "Laid-out bytes of the plan",
        (
            *("document", "tokens", "budget", "codes", "padding", "page table"),
            *("positions", "fixed tables", "total", "bits/coordinate"),
        ),
        [
            (
                plan.name,
                plan.n_context,
                bytes_text(plan.budget_bytes),
                bytes_text(plan.laid_out.codes),
                bytes_text(plan.laid_out.padding),
                bytes_text(plan.laid_out.page_table),
                bytes_text(plan.laid_out.positions),
                bytes_text(plan.laid_out.fixed_tables),
                bytes_text(plan.laid_out.total),
                plan.laid_out_rate,
            )
            for plan in summary.plans
        ],
    )


def _comparisons(title: str, plans: Sequence[DocumentPlan]) -> Table:
    rows: list[tuple[object, ...]] = []
    for plan in plans:
        rows.append((plan.name, "dual bound", "", plan.dual_bound, 1 - plan.gap, None, None))
        rows.append((plan.name, "plan", "per page", plan.cost, 1.0, plan.measured, 1.0))
        for row in plan.baselines:
            measured = row.measured / plan.measured if row.measured and plan.measured else None
            rows.append(
                (plan.name, row.name, row.tier, row.cost, row.times_plan, row.measured, measured)
            )
    columns = ["document", "plan", "tier", "predicted", "x plan", "measured", "x plan"]
    if all(plan.measured is None for plan in plans):
        columns, rows = columns[:5], [row[:5] for row in rows]
    return Table(title, columns, rows, text_columns=3)


def _tiers(summary: AllocationSummary) -> Table:
    n_plans = len(summary.plans)
    mean = [sum(plan.tier_mix[i] for plan in summary.plans) / n_plans for i in range(_n(summary))]
    spread = [sorted(head.fractions[i] for head in summary.heads) for i in range(_n(summary))]
    return Table(
        "Tier mix, fraction of the pages",
        ("tier", "bytes a page", "mean", "least used in a head", "most used in a head"),
        [
            (name, size, mean[i], spread[i][0], spread[i][-1])
            for i, (name, size) in enumerate(
                zip(summary.options, summary.option_bytes, strict=True)
            )
        ],
    )


def _n(summary: AllocationSummary) -> int:
    return len(summary.options)


def _layers(summary: AllocationSummary) -> Table:
    rows = []
    for agreement in summary.agreement:
        heads = [head for head in summary.heads if head.layer == agreement.layer]
        rates = [head.bits_per_coordinate for head in heads]
        rows.append(
            (
                agreement.layer,
                " ".join(f"{rate:.2f}" for rate in rates),
                sum(head.fractions[0] for head in heads) / len(heads),
                agreement.error_log_correlation,
                agreement.error_ratio,
                agreement.future_log_correlation,
                agreement.drop_coherence,
                agreement.drop_coefficient,
                agreement.code_coherence,
                agreement.code_coefficient,
            )
        )
    return Table(
        f"Layers: bits per coordinate of each KV head; and on {summary.check_split} documents: "
        "errors of the tiers and scores against what they predict, damage of drops and codes over "
        "its sum",
        (
            *("layer", "bits by head", "dropped", "error corr.", "predicted/measured"),
            *("score corr.", "drops", "drops priced at", "codes", "codes priced at"),
        ),
        rows,
        text_columns=2,
    )


def _positions(summary: AllocationSummary) -> Table:
    return Table(
        "By position, from both ends of the context",
        ("from", "first", "last", "bits/coordinate", "dropped", "protected (8 bits or more)"),
        [
            (row.end, row.first, row.last, row.bits_per_coordinate, row.dropped, row.protected)
            for row in summary.discovery.positions
        ],
    )


def _sinks(summary: AllocationSummary) -> tuple[Block, ...]:
    found = summary.discovery
    if not found.sinks:
        return (Line("No token is protected by half of the heads: no sink was found."), Line())
    return (
        Table(
            f"Sinks: tokens that half of the heads protect ({found.n_sinks} in all)",
            ("document", "position", "share of the heads"),
            [(row.document, row.position, row.share) for row in found.sinks],
        ),
    )


def _assumptions(result: AllocationResult) -> tuple[str, ...]:
    summary = result.summary
    calibrated = (
        f"calibrated per layer and KV head on {counted(result.n_fit_documents, 'fit document')}"
        if summary.is_calibrated
        else "not calibrated"
    )
    return (
        f"score: {summary.utility}; {calibrated}",
        *([] if summary.pins == NO_PINS else [f"kept whatever they score: {summary.pins}"]),
        f"pages of {summary.page_size} tokens; window {summary.window}, horizon {summary.horizon}",
        f"drop coefficient {_times(summary.drop_coefficient, summary.drop_coefficient_range)} "
        f"({summary.drop_coefficient_source})",
        f"code coefficient {_times(summary.code_coefficient, summary.code_coefficient_range)} "
        f"({summary.code_coefficient_source})",
        "prices for other budgets were found at "
        f"{', '.join(f'{rate:.3g}' for rate in summary.price_rates)} bits per coordinate",
        f"weight of a head: {summary.weights}",
        "cost: expected squared error of the attention outputs of one later query, so weighted, "
        "summed over layers and heads",
        f"{result.seconds:.1f} s; digest {result.digest}",
    )


def _times(mean: float, ends: tuple[float, float]) -> str:
    low, high = ends
    if low == high:
        return f"{low:g}"
    return f"{times_text(mean, 3)} (geometric mean; {times_text(low, 3)} to {times_text(high, 3)})"
