"""The roofline of decode attention: operations per second over operations per byte.

    operations = 4 head_dim per token and query head (q.k and p v), the same for every format
    roof       = read rate x operations per byte

Fewer bytes move a point to the right, where the roof is higher; the distance to the roof is what
the kernel loses. The tensor cores' own roof is far above and not drawn: it was not measured.
"""

from collections.abc import Sequence

from sphkv_cli.plots.figures import Figure, PlotPanel, Series
from sphkv_kernels.benchmark import CaseReport


def roofline(cases: Sequence[CaseReport], read_gb_per_s: float) -> Figure:
    """One point per case, the bf16 baselines of the same shapes, and the roof."""
    points: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        shape = case.shape
        tokens = shape.n_sequences * shape.n_kv_heads * shape.n_tokens
        operations = 4.0 * tokens * shape.group_size * shape.head_dim
        of_code = (
            operations / case.bytes_read["codes"],
            operations / case.latency.median_us / 1e6,
        )
        dense = operations / shape.dense_bytes, operations / case.best_bf16_us / 1e6
        points.setdefault(case.tiers[0], []).append(of_code)
        points.setdefault("best bf16", []).append(dense)
    every = [x for found in points.values() for x, _ in found]
    ends = (min(every) / 2, max(every) * 2)
    series = [Series("read rate", ends, [x * read_gb_per_s / 1e3 for x in ends], "dashed")]
    for name, found in points.items():
        unique = sorted(set(found))
        series.append(Series(name, [x for x, _ in unique], [y for _, y in unique], "points"))
    panel = PlotPanel(
        "Decode attention under the memory roof",
        "operations per byte read",
        "10^12 operations per second",
        series,
        x_scale="log",
        y_scale="log",
    )
    return Figure("roofline", "Fewer bytes raise the roof; the gap to it is the kernel's.", [panel])
