"""Figures: refused when they cannot be meant, and drawn as what they say."""

import math
from pathlib import Path

import pytest

from sphkv_cli.errors import EnvironmentUnable
from sphkv_cli.plots import draw as drawing
from sphkv_cli.plots.draw import draw, require_matplotlib
from sphkv_cli.plots.figures import Figure, GridPanel, PlotPanel, Series


def panel(n_series: int = 2, **options: object) -> PlotPanel:
    series = [Series(f"s{i}", (1.0, 2.0, 3.0), (i + 1.0, math.nan, 2.0)) for i in range(n_series)]
    return PlotPanel("title", "x", "y", series, **options)  # type: ignore[arg-type]


def test_what_cannot_be_drawn_is_refused_when_it_is_made() -> None:
    for make in (
        lambda: Series("s", (1.0,), (1.0, 2.0)),
        lambda: Series("s", (1.0,), (1.0,), "wavy"),  # type: ignore[arg-type]
        lambda: PlotPanel("t", "x", "y", ()),
        lambda: GridPanel("t", "x", "y", ((1.0,), (1.0, 2.0)), "c"),
        lambda: Figure("Not A Name", "c", (panel(),)),
        lambda: Figure("name", "c", ()),
    ):
        with pytest.raises(ValueError):
            make()


@pytest.mark.parametrize("image_format", ["png", "svg"])
def test_a_figure_is_the_same_bytes_every_time(tmp_path: Path, image_format: str) -> None:
    grid = GridPanel("g", "x", "y", ((1.0, math.nan), (0.0, 10.0)), "c", "log")
    figure = Figure("f", "c", (panel(), panel(8, y_scale="log"), grid))
    for name in ("a", "b"):
        draw(figure, tmp_path / name, image_format)  # type: ignore[arg-type]
    first = (tmp_path / "a").read_bytes()
    assert first.startswith(b"\x89PNG" if image_format == "png" else b"<?xml")
    if image_format == "png":  # an SVG's ids are drawn at random
        assert first == (tmp_path / "b").read_bytes()


def test_a_label_has_one_colour_and_many_shared_labels_one_legend() -> None:
    shared = Figure("f", "c", (panel(8), panel(7)))
    assert drawing._shares_legend(shared)
    assert not drawing._shares_legend(Figure("f", "c", (panel(8),)))
    assert not drawing._shares_legend(Figure("f", "c", (panel(3), panel(3))))
    assert len(set(drawing._colors(shared).values())) == 8


def test_what_is_emphasised_is_black_and_then_grey() -> None:
    named = [Series(name, (1.0,), (1.0,), emphasis=name != "rival") for name in ("a", "rival", "b")]
    colors = drawing._colors(Figure("f", "c", (PlotPanel("t", "x", "y", named),)))
    assert colors["a"] == (0, 0, 0)
    assert colors["b"] == (0.65, 0.65, 0.65)
    assert len(set(colors["rival"][:3])) > 1


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentUnable, match="sphkv\\[plot\\]"):
        require_matplotlib("--plot")
