"""The needle's grids as a picture: one panel per coding, lengths against depths."""

from pathlib import Path

from sphkv_cli.errors import UsageError
from sphkv_cli.evaluation.probe_options import ProbeOptions
from sphkv_cli.evaluation.probe_result import ProbeResult
from sphkv_cli.plots.draw import require_drawable
from sphkv_cli.plots.figures import Figure, GridPanel


def checked_plot(path: Path | None, asked: ProbeOptions) -> None:
    """Refuse a picture that cannot be drawn before anything runs.

    Raises:
        UsageError: no needle, or a suffix other than .png and .svg.
        EnvironmentUnable: matplotlib is not installed.
    """
    if path is None:
        return
    if asked.kind != "needle":
        raise UsageError(f"--plot draws a needle's grid, not {asked.kind}", "pass --probe needle")
    require_drawable(path)


def grid_figure(result: ProbeResult) -> Figure:
    """One panel per row; a cell is a length (row, short first) at a depth (column)."""
    grids = [row.grid for row in result.rows if row.grid is not None]
    lengths = ", ".join(map(str, result.lengths))
    depths = ", ".join(f"{depth:g}" for depth in grids[0].depths)
    return Figure(
        "needle",
        f"{result.model}: digits of one code that come back, contexts of {lengths} tokens, "
        f"stated at depths {depths}",
        tuple(
            GridPanel(
                f"{grid.coding}, {grid.laid_out_rate:.2f} b",
                "depth of the statement",
                "context tokens",
                grid.digit_accuracy,
                "digits that come back",
                row_names=tuple(map(str, grid.lengths)),
                column_names=tuple(f"{depth:g}" for depth in grid.depths),
                # Colours of one probe mean the same in every picture.
                limits=(0.0, 1.0),
            )
            for grid in grids
        ),
    )
