"""What the study of books says: reading, tables and figures from its numbers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sphkv_cli.blocks import Table
from sphkv_cli.evaluation.intervals import Interval, mean_interval
from sphkv_cli.plots.figures import Figure, PlotPanel, Series, SeriesStyle
from sphkv_cli.study.book_timing import Cost
from sphkv_cli.study.coding_errors import CodingErrors
from sphkv_codebooks.rotation import RotationKind

BOOKS = ("analytic", "offline", "online")
ROTATIONS: tuple[RotationKind, ...] = ("hadamard", "none")


@dataclass(frozen=True)
class Judged:
    """One coding under every rotation seed: errors; kl of the next token, empty without a model."""

    code: str
    rotation: str
    books: str
    code_rate: float
    table_bytes: int
    errors: tuple[CodingErrors, ...]
    kl: tuple[float, ...]

    @property
    def mean_kl(self) -> float | None:
        """Over seeds."""
        return float(np.mean(self.kl)) if self.kl else None

    def mean(self, quantity: Callable[[CodingErrors], float]) -> float:
        """Over seeds."""
        return float(np.mean([quantity(errors) for errors in self.errors]))

    @property
    def output_error(self) -> float:
        """Mean over seeds."""
        return self.mean(lambda errors: errors.output_error)

    def output_ratio(self, other: "Judged") -> Interval:
        """Output error over that of another, paired by seed."""
        return _ratio(
            [errors.output_error for errors in self.errors],
            [errors.output_error for errors in other.errors],
        )

    def kl_ratio(self, other: "Judged") -> Interval:
        """KL over that of another, paired by seed; both were run."""
        return _ratio(self.kl, other.kl)


def _ratio(values: Sequence[float], others: Sequence[float]) -> Interval:
    found = mean_interval([math.log(a / b) for a, b in zip(values, others, strict=True)])
    return Interval(math.exp(found.mean), math.exp(found.low), math.exp(found.high))


def _text(ratio: Interval) -> str:
    if math.isnan(ratio.low):
        return f"x{ratio.mean:.3f}"
    return f"x{ratio.mean:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def read(judged: Sequence[Judged], costs: Sequence[Cost]) -> tuple[str, str]:
    """Whether fitted books help, with and without rotation; what online books cost."""
    by = {(j.code, j.rotation, j.books): j for j in judged}
    code = judged[0].code
    turned, straight = ({name: by[code, kind, name] for name in BOOKS} for kind in ROTATIONS)
    base = turned["analytic"]
    changes = [f"{name} {_text(turned[name].output_ratio(base))}" for name in BOOKS[1:]]
    kl = ""
    if base.kl:
        parts = [f"{name} {_text(turned[name].kl_ratio(base))}" for name in BOOKS[1:]]
        kl = f", KL {' and '.join(parts)}"
    best = min(straight.values(), key=lambda j: j.output_error)
    verdict = "still loses to" if best.output_error > base.output_error else "beats"
    first = (
        f"After rotation fitted books change the output error of {code} by {' and '.join(changes)}"
        f"{kl} of analytic ones (95 % over rotation seeds); without rotation analytic books have "
        f"x{straight['analytic'].output_error / base.output_error:.2f} the output error, and the "
        f"best of the others ({best.books}, x{best.output_error / base.output_error:.2f}) "
        f"{verdict} rotated analytic ones."
    )
    cost = {c.name.rpartition(", ")[2]: c for c in costs}
    kivi = cost["KIVI-2"]
    prefill = {name: cost[name].prefill_ms / kivi.prefill_ms for name in BOOKS}
    token = {name: cost[name].generation_ms / kivi.generation_ms for name in BOOKS}
    second = (
        f"Coding a prompt takes x{prefill['analytic']:.1f} the time of KIVI-2 with analytic books, "
        f"x{prefill['offline']:.1f} with fitted ones (level 1 is no longer uniform on the circle) "
        f"and x{prefill['online']:.1f} where they are fitted online; a generated token takes "
        f"x{token['analytic']:.1f}, x{token['offline']:.1f} and x{token['online']:.1f}."
    )
    return first, second


def quality_table(judged: Sequence[Judged]) -> Table:
    """Means over seeds."""
    columns = ("b code", "tables, KiB", "key D", "value D", "logit rms", "output error")
    return Table(
        "Quality by books",
        ("code", "rotation", "books", *columns, "worst head", "KL"),
        [
            (
                j.code,
                j.rotation,
                j.books,
                f"{j.code_rate:.2f}",
                f"{j.table_bytes / 1024:.1f}",
                j.mean(lambda errors: errors.key_distortion),
                j.mean(lambda errors: errors.value_distortion),
                j.mean(lambda errors: errors.logit_rms),
                j.output_error,
                j.mean(lambda errors: errors.worst_head),
                j.mean_kl,
            )
            for j in judged
        ],
        text_columns=3,
    )


def ratio_table(judged: Sequence[Judged]) -> Table:
    """Fitted books over analytic ones under the same rotations."""
    analytic = {(j.code, j.rotation): j for j in judged if j.books == "analytic"}
    rows = []
    for j in judged:
        if j.books in BOOKS[1:]:
            base = analytic[j.code, j.rotation]
            kl = _text(j.kl_ratio(base)) if j.kl else None
            rows.append((j.code, j.rotation, j.books, _text(j.output_ratio(base)), kl))
    return Table(
        "Fitted books over analytic ones (95 % over rotation seeds, not over documents)",
        ("code", "rotation", "books", "output error", "KL"),
        rows,
        text_columns=3,
    )


def cost_table(costs: Sequence[Cost], n_tokens: int) -> Table:
    """Wall-clock beside KIVI-2's."""
    kivi = next(c for c in costs if c.name == "KIVI-2")
    return Table(
        f"Cost of one layer at {n_tokens} tokens, ms; x: of KIVI-2",
        ("codec", "b code", "prefill", "of it fit", "x", "one token", "read", "generation", "x"),
        [
            (
                c.name,
                f"{c.code_rate:.2f}",
                f"{c.prefill_ms:.1f}",
                f"{c.fit_ms:.1f}",
                f"{c.prefill_ms / kivi.prefill_ms:.2f}",
                f"{c.token_ms:.2f}",
                f"{c.read_ms:.1f}",
                f"{c.generation_ms:.1f}",
                f"{c.generation_ms / kivi.generation_ms:.2f}",
            )
            for c in costs
        ],
    )


def quality_figure(judged: Sequence[Judged]) -> Figure:
    """Output error, and KL where a model ran, over the code rate."""
    quantities: list[tuple[str, Callable[[Judged], float | None]]] = [
        ("output error", lambda j: j.output_error)
    ]
    if judged[0].kl:
        quantities.append(("KL, nats", lambda j: j.mean_kl))
    panels = []
    for title, of in quantities:
        series = []
        for kind in ROTATIONS:
            for books in BOOKS:
                rows = [j for j in judged if (j.rotation, j.books) == (kind, books)]
                label = f"{'no rotation' if kind == 'none' else kind}, {books}"
                style: SeriesStyle = "dashed" if kind == "none" else "both"
                series.append(_over_rate(label, rows, of, style))
        kivi = [j for j in judged if j.books not in BOOKS]
        if kivi:
            series.append(_over_rate("KIVI", kivi, of, "points"))
        panels.append(
            PlotPanel(title, "bits per coordinate (code rate)", title, series, y_scale="log")
        )
    return Figure("books-quality", "Damage by kind of books, with and without rotation.", panels)


def _over_rate(
    label: str, rows: Sequence[Judged], of: Callable[[Judged], float | None], style: SeriesStyle
) -> Series:
    ordered = sorted(rows, key=lambda j: j.code_rate)
    values = [of(j) for j in ordered]
    return Series(
        label,
        [j.code_rate for j in ordered],
        [math.nan if value is None else value for value in values],
        style,
    )


def cost_figure(costs: Sequence[Cost], n_tokens: int) -> Figure:
    """Prefill and generation over the code rate."""
    panels = [
        PlotPanel(
            title,
            "bits per coordinate (code rate)",
            "ms per layer",
            [Series(c.name, [c.code_rate], [value], "points") for c, value in parts],
        )
        for title, parts in (
            ("prefill coding", [(c, c.prefill_ms) for c in costs]),
            ("one generated token", [(c, c.generation_ms) for c in costs]),
        )
    ]
    caption = f"Wall-clock of one layer at {n_tokens} tokens, torch on the CPU."
    return Figure("books-cost", caption, panels)
