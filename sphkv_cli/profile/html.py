"""A report as one HTML page that needs no network: its tables, and plots by matplotlib."""

import base64
import html
import io
from pathlib import Path

from sphkv_cli.artifacts.report import write_text
from sphkv_cli.artifacts.store import check_output
from sphkv_cli.blocks import Block, Line, cell_text
from sphkv_cli.plots.draw import draw_grid, require_matplotlib
from sphkv_cli.plots.figures import GridPanel
from sphkv_cli.profile.result import CandidateReport, ProfileReport
from sphkv_cli.profile.view import view

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0 2em; }
caption { text-align: left; font-weight: 600; padding-bottom: .3em; }
th, td { padding: .15em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th.text, td.text { text-align: left; }
img { max-width: 100%; }
"""


def write_html(report: ProfileReport, path: Path, *, force: bool = False) -> None:
    """Write the page.

    Raises:
        EnvironmentUnable: matplotlib is missing.
        ArtifactError: `path` exists and `force` is false, or its folder cannot be written.
    """
    require_matplotlib("--html")
    check_output(path, force=force, option="--html")
    title = f"sphkv profile: {report.content.model}"
    body = "\n".join(_block(block) for block in view(report))
    pictures = "\n".join(
        f'<h2>{html.escape(caption)}</h2>\n<img alt="{html.escape(caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for caption, png in _plots(report)
    )
    write_text(
        path,
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n{pictures}\n"
        f"<p>Digest of report.json: {report.digest}</p></body></html>\n",
    )


def _block(block: Block) -> str:
    if isinstance(block, Line):
        return f"<p>{html.escape(block.text)}</p>"
    kinds = ["text" if i < block.text_columns else "number" for i in range(len(block.columns))]
    head = "".join(
        f"<th class='{kind}'>{html.escape(column)}</th>"
        for kind, column in zip(kinds, block.columns, strict=True)
    )
    rows = "\n".join(
        "<tr>"
        + "".join(
            f"<td class='{kind}'>{html.escape(cell_text(cell))}</td>"
            for kind, cell in zip(kinds, row, strict=True)
        )
        + "</tr>"
        for row in block.rows
    )
    return f"<table><caption>{html.escape(block.title)}</caption><tr>{head}</tr>\n{rows}</table>"


def _plots(report: ProfileReport) -> list[tuple[str, bytes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def drawn(figure: Figure) -> bytes:
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)
        return buffer.getvalue()

    candidates = report.content.candidates
    plan = candidates[0]
    pictures = []
    for caption, values in (
        (
            "Logit error (rms, softmax units) of the plan, layer by query head",
            plan.heads.logit_rmse,
        ),
        ("Relative output error of the plan, by layer and head", plan.heads.output_error),
    ):
        figure = Figure(figsize=(7, 5), layout="constrained")
        panel = GridPanel("", "query head", "layer", values.tolist(), "")
        draw_grid(figure, figure.subplots(), panel)
        pictures.append((caption, drawn(figure)))
    figure = Figure(figsize=(7, 5), layout="constrained")
    _error_against_rate(figure, candidates)
    pictures.append(("Output error against bits per coordinate laid out", drawn(figure)))
    return pictures


def _error_against_rate(figure, candidates: tuple[CandidateReport, ...]) -> None:  # type: ignore[no-untyped-def]
    axes = figure.subplots()
    for c in candidates:
        marker = {"plan": "*", "policy": "D", "uniform": "o"}[c.kind]
        axes.plot(c.laid_out_rate, c.output_error, marker, label=c.name)
        axes.plot(c.laid_out_rate, c.worst_output_error.value, marker, color="grey", alpha=0.4)
    axes.set_yscale("log")
    axes.set_xlabel("bits per coordinate, laid out")
    axes.set_ylabel("relative output error: rms over heads (grey: worst head)")
    axes.legend(fontsize="small")
