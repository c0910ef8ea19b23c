"""Rows and columns of a grid carry their names, or are refused."""

from pathlib import Path

import pytest

from sphkv_cli.plots.draw import draw, draw_grid
from sphkv_cli.plots.figures import Figure, GridPanel


def grid(**names: tuple[str, ...]) -> GridPanel:
    return GridPanel("t", "x", "y", [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "z", **names)


def test_names_of_rows_and_columns_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "grid.svg"
    panel = grid(row_names=("prose", "news"), column_names=("a1", "b2", "c3"))
    draw(Figure("grid", "A grid.", [panel]), path, "svg")
    drawn = path.read_text()
    # matplotlib leaves each text beside its glyphs as a comment.
    assert all(f"<!-- {name} -->" in drawn for name in ("prose", "news", "a1", "b2", "c3"))


@pytest.mark.parametrize("names", [{"row_names": ("a",)}, {"column_names": ("a", "b")}])
def test_a_grid_refuses_names_for_other_rows(names: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(ValueError, match="'t' names"):
        grid(**names)


def test_rows_and_columns_without_names_have_whole_numbers() -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas()
    ax = canvas.subplots()
    draw_grid(canvas, ax, grid())
    for ticks in (ax.get_xticks(), ax.get_yticks()):
        assert len(ticks) and all(tick == round(tick) for tick in ticks)
