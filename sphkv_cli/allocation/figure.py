"""What an allocation found, as one figure: bytes by head, drops by head, and both ends."""

import numpy as np

from sphkv_cli.allocation.discovery import PositionRow
from sphkv_cli.allocation.result import AllocationSummary
from sphkv_cli.plots.figures import Figure, GridPanel, PlotPanel, Series


def discovery_figure(summary: AllocationSummary) -> Figure:
    """Heat maps of layer x KV head, the profile from both ends, and the tier mix by layer."""
    found = summary.discovery
    return Figure(
        "discovery",
        f"Where the plans spend {summary.budget}: nothing is pinned, the solver found it.",
        (
            _grid(summary, "Bits per coordinate", "bits", dropped=False),
            _grid(summary, "Dropped", "share of the pages", dropped=True),
            _ends(
                "Bits by position", "bits per coordinate", found.positions, "bits_per_coordinate"
            ),
            _ends("Protected (8 bits or more) by position", "share", found.positions, "protected"),
            _mix(summary),
            _ends("Dropped by position", "share", found.positions, "dropped"),
        ),
    )


def _grid(summary: AllocationSummary, title: str, label: str, *, dropped: bool) -> GridPanel:
    n_layers = 1 + max(head.layer for head in summary.heads)
    n_heads = 1 + max(head.kv_head for head in summary.heads)
    values = np.zeros((n_layers, n_heads))
    for head in summary.heads:
        values[head.layer, head.kv_head] = (
            head.fractions[0] if dropped else head.bits_per_coordinate
        )
    return GridPanel(title, "KV head", "layer", values.tolist(), label)


def _ends(title: str, label: str, rows: tuple[PositionRow, ...], name: str) -> PlotPanel:
    series = []
    for end, text in (("start", "from the start"), ("end", "from the end")):
        chosen = [row for row in rows if row.end == end]
        # Bins on a logarithmic axis: 1 is the very first token of either end.
        places = [1 + (row.first + row.last) / 2 for row in chosen]
        series.append(Series(text, places, [getattr(row, name) for row in chosen], "both"))
    return PlotPanel(title, "tokens from that end", label, series, x_scale="log")


def _mix(summary: AllocationSummary) -> PlotPanel:
    layers = sorted({head.layer for head in summary.heads})
    series = []
    for index, option in enumerate(summary.options):
        share = [
            float(np.mean([h.fractions[index] for h in summary.heads if h.layer == layer]))
            for layer in layers
        ]
        if max(share) > 0:
            series.append(Series(option, layers, share, "line", emphasis=index == 0))
    return PlotPanel("Tier mix by layer", "layer", "share of the pages", series)
