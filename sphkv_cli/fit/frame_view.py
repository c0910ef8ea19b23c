"""The frames of a fit for people: per layer, what each centring leaves and what was chosen."""

from collections.abc import Sequence

from sphkv_cli.artifacts.fit_tables import FrameRow
from sphkv_cli.blocks import Table
from sphkv_cli.fit.frame_reading import CENTRINGS, error_by_centring
from sphkv_kernels.decode_cost import position_term_cost


def frame_table(rows: Sequence[FrameRow]) -> Table:
    """One row per layer; a centring that was not tried is a dash."""
    lines = []
    for layer in sorted({row.layer for row in rows}):
        of_layer = [row for row in rows if row.layer == layer]
        first = error_by_centring(of_layer)
        chosen = next(row for row in of_layer if row.is_chosen)
        lines.append(
            (
                layer,
                chosen.centring,
                chosen.balancing,
                chosen.rope_pairs or None,
                f"{position_term_cost(chosen.rope_pairs):.0%}",
                *(first.get(kind) for kind in CENTRINGS),
                chosen.output_error,
                chosen.worst_output_error,
            )
        )
    return Table(
        "Frames: relative squared output error of a 3-bit key code, by centring without balancing",
        (
            *("layer", "centring", "balancing", "RoPE pairs", "time at most"),
            *CENTRINGS,
            *("chosen", "worst head (root)"),
        ),
        lines,
        text_columns=3,
    )
