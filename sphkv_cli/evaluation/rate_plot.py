"""KL against laid-out bits, one line per family of rows; and KL by position at one rate.

The second panel shows each family's row nearest to one rate, so that a loss that grows with every
token read (drift) is told from one that does not.
"""

from sphkv_cli.evaluation.quantisers import ENDS_DENSE
from sphkv_cli.evaluation.result import EvaluationResult, Row
from sphkv_cli.plots.figures import Figure, PlotPanel, Series

_RATE, _AROUND = 3.0, 0.6
"""Bits per coordinate of the second panel, and how far from it a row may lie."""
_EMPHASISED = "policy"


def rate_figure(result: EvaluationResult) -> Figure:
    """The panels of an evaluation, or of what a report of one holds."""
    families: dict[str, list[Row]] = {}
    for row in result.rows[:-1]:
        families.setdefault(row.family, []).append(row)
    # In retention the tokens after the context are the same for all and lie dense.
    is_retention = result.protocol == "retention"

    def rate(row: Row) -> float:
        return row.coded_laid_out_rate if is_retention else row.laid_out_rate

    lines = []
    for family, rows in families.items():
        rows.sort(key=rate)
        base = family.removesuffix(ENDS_DENSE)
        lines.append(
            Series(
                family,
                [rate(row) for row in rows],
                [row.kl_geometric.mean for row in rows],
                style="both" if base == family else "dashed-both",
                emphasis=family == _EMPHASISED,
                pair_of=base if base != family and base in families else "",
            )
        )
    what = "of the context" if is_retention else "of the whole cache"
    panels = [
        PlotPanel(
            f"{result.model}, judged documents: {result.n_documents}"
            + ("\n(dashed: ends of the context dense)" if any(s.pair_of for s in lines) else ""),
            f"laid-out bits per coordinate {what}",
            "KL to the dense model, nats",
            lines,
            y_scale="log",
        )
    ]
    near = [
        min(rows, key=lambda row: abs(rate(row) - _RATE))
        for family, rows in families.items()
        if not family.endswith(ENDS_DENSE)
    ]
    drift = [_drift(row) for row in near if abs(rate(row) - _RATE) <= _AROUND]
    if drift:
        start = result.rows[0].by_position[0].first
        panels.append(
            PlotPanel(
                f"Rows of about {_RATE:g} bits",
                "tokens after the context" if is_retention else f"tokens after the first {start}",
                "KL to the dense model, nats",
                drift,
                y_scale="log",
            )
        )
    return Figure("evaluation", result.protocol_description, panels)


def _drift(row: Row) -> Series:
    start = row.by_position[0].first
    return Series(
        row.family,
        [(position.first + position.last) / 2 - start for position in row.by_position],
        [position.kl for position in row.by_position],
        style="both",
        emphasis=row.family == _EMPHASISED,
    )
