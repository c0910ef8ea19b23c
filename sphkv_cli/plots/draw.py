"""Figures drawn by matplotlib, which is imported only here and only when something is drawn."""

import importlib.util
from pathlib import Path
from typing import Any, Literal

from sphkv_cli.artifacts.store import replaced_when_whole
from sphkv_cli.errors import EnvironmentUnable, UsageError
from sphkv_cli.plots.figures import Figure, GridPanel, Panel, PlotPanel

ImageFormat = Literal["png", "svg"]

_PANEL_INCHES = (5.2, 3.7)
_LEGEND_INCHES = 2.6
_ENTRY_INCHES = 0.21
_MOST_INSIDE = 6
_LIGHTEST_GREY = 0.65
_STYLES: dict[str, dict[str, Any]] = {
    "line": {"linestyle": "-"},
    "points": {"linestyle": "", "marker": "o", "markersize": 4},
    "both": {"linestyle": "-", "marker": "o", "markersize": 4},
    "steps": {"drawstyle": "steps-post"},
    "dashed": {"linestyle": "--"},
    "dashed-both": {"linestyle": "--", "marker": "o", "markersize": 4, "markerfacecolor": "white"},
}


def require_matplotlib(wanted_by: str) -> None:
    """Refuse early what `draw` could not do.

    Raises:
        EnvironmentUnable: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise EnvironmentUnable(
            f"{wanted_by} draws its figures with matplotlib, which is missing",
            f"pip install 'sphkv[plot]', or leave {wanted_by} out",
        )


def require_drawable(path: Path | None) -> None:
    """Refuse a --plot that cannot be drawn before anything runs; None passes.

    Raises:
        UsageError: a suffix other than .png and .svg.
        EnvironmentUnable: matplotlib is missing.
    """
    if path is None:
        return
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"--plot {path} is neither .png nor .svg", "end it in one of them")
    require_matplotlib("--plot")


def write_figure(figure: Figure, path: Path) -> None:
    """Draw to `path`, whole or not at all; its suffix says as what."""
    with replaced_when_whole(path) as temporary:
        draw(figure, temporary, "svg" if path.suffix == ".svg" else "png")


def draw(figure: Figure, path: Path, image_format: ImageFormat = "png") -> None:
    """Write `figure` to `path`; raises OSError where it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    n_columns = min(figure.n_columns, len(figure.panels))
    width, height = _PANEL_INCHES
    share_legend = _shares_legend(figure)
    if share_legend:
        entries = {label for panel in figure.panels for label in _labels(panel)}
        height = max(height, (len(entries) + 1) * _ENTRY_INCHES / figure.n_rows)
    canvas = Canvas(
        figsize=(width * n_columns + share_legend * _LEGEND_INCHES, height * figure.n_rows),
        layout="constrained",
    )
    axes = canvas.subplots(figure.n_rows, n_columns, squeeze=False).flat
    colors = _colors(figure)
    handles: dict[str, Any] = {}
    for panel in figure.panels:
        ax = next(axes)
        if isinstance(panel, GridPanel):
            draw_grid(canvas, ax, panel)
        else:
            handles |= _draw_series(ax, panel, colors, has_legend=not share_legend)
    for unused in axes:
        unused.set_axis_off()
    if share_legend:
        canvas.legend(handles.values(), handles.keys(), fontsize="small", loc="outside right upper")
    if image_format == "png":
        FigureCanvasAgg(canvas).print_png(path, metadata={"Software": None})
    else:
        FigureCanvasSVG(canvas).print_svg(path, metadata={"Date": None})


def _draw_series(
    ax: Any, panel: PlotPanel, colors: dict[str, Any], *, has_legend: bool
) -> dict[str, Any]:
    """Draw, and return what a legend would show, by label."""
    handles = {}
    for series in panel.series:
        (drawn,) = ax.plot(
            series.x,
            series.y,
            label="" if series.pair_of else series.label,
            color=colors[series.pair_of or series.label],
            linewidth=2.6 if series.emphasis else 1.3,
            zorder=4 if series.style == "points" else 3 if series.emphasis else 2,
            **_STYLES[series.style],
        )
        if not series.pair_of:
            handles[series.label] = drawn
    _label(ax, panel)
    ax.set_xscale(panel.x_scale)
    ax.set_yscale(panel.y_scale)
    ax.grid(True, color="#dddddd", linewidth=0.6)
    if has_legend and len(panel.series) > _MOST_INSIDE:  # many names would hide what they name
        ax.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    elif has_legend and any(series.label for series in panel.series):
        ax.legend(fontsize="x-small", framealpha=0.8)
    return handles


def draw_grid(canvas: Any, ax: Any, panel: GridPanel) -> None:
    """Draw `panel` on axes of a matplotlib figure `canvas`."""
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    values = np.ma.masked_invalid(np.asarray(panel.values, dtype=np.float64))
    norm = None
    if panel.color_scale == "log":
        values = np.ma.masked_less_equal(values, 0.0)
        norm = LogNorm()
    image = ax.imshow(values, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
    if panel.limits is not None:
        image.set_clim(*panel.limits)
    _label(ax, panel)
    for axis in (ax.xaxis, ax.yaxis):  # rows and columns are counted: there is no column 0.5
        axis.set_major_locator(MaxNLocator(integer=True))
    if panel.row_names:
        ax.set_yticks(range(len(panel.row_names)), panel.row_names)
    if panel.column_names:
        ax.set_xticks(range(len(panel.column_names)), panel.column_names, rotation=30, ha="right")
    canvas.colorbar(image, ax=ax, label=panel.color_label)


def _label(ax: Any, panel: PlotPanel | GridPanel) -> None:
    ax.set_title(panel.title, fontsize="medium")
    ax.set_xlabel(panel.x_label)
    ax.set_ylabel(panel.y_label)


def _labels(panel: Panel) -> list[str]:
    """Of what a legend names."""
    if isinstance(panel, GridPanel):
        return []
    return [series.label for series in panel.series if not series.pair_of]


def _shares_legend(figure: Figure) -> bool:
    """Whether panels name mostly the same many things, so that one legend serves them all."""
    every = {label for panel in figure.panels for label in _labels(panel)}
    most = max(len(_labels(panel)) for panel in figure.panels)
    return len(figure.panels) > 1 and most > _MOST_INSIDE and len(every) <= 1.5 * most


def _colors(figure: Figure) -> dict[str, Any]:
    """A label has one colour in all panels of a figure; what is emphasised is black, then grey."""
    import matplotlib

    labels = list(dict.fromkeys(label for panel in figure.panels for label in _labels(panel)))
    emphasised = {
        series.label
        for panel in figure.panels
        if not isinstance(panel, GridPanel)
        for series in panel.series
        if series.emphasis and not series.pair_of
    }
    greys = [label for label in labels if label in emphasised]
    others = [label for label in labels if label not in emphasised]
    colors = matplotlib.colormaps["tab10" if len(others) <= 10 else "tab20"]
    found = {label: colors(index % colors.N) for index, label in enumerate(others)}
    lightest = _LIGHTEST_GREY / max(len(greys) - 1, 1)
    return found | {label: (index * lightest,) * 3 for index, label in enumerate(greys)}
