"""What a figure shows, as data: panels of series or a grid of numbers. `draw.py` draws it.

Stages make figures without knowing matplotlib, and the numbers of a figure are stored beside it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

SeriesStyle = Literal["line", "points", "both", "steps", "dashed", "dashed-both"]
Scale = Literal["linear", "log"]

_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True)
class Series:
    """Numbers y over x, equally many; NaN leaves a gap. `steps`: y[i] holds from x[i] to x[i+1].

    emphasis: drawn thicker, black (several: to grey) and above the others, for what it is about.
    pair_of: the label whose colour it has; the legend then names that one alone.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: SeriesStyle = "line"
    emphasis: bool = False
    pair_of: str = ""

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"{self.label}: {len(self.x)} x and {len(self.y)} y")
        if self.style not in get_args(SeriesStyle):
            raise ValueError(f"{self.label}: no style {self.style!r}")


@dataclass(frozen=True)
class PlotPanel:
    """Series over common axes."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    x_scale: Scale = "linear"
    y_scale: Scale = "linear"

    def __post_init__(self) -> None:
        if not self.series:
            raise ValueError(f"the panel {self.title!r} has no series")


@dataclass(frozen=True)
class GridPanel:
    """A number per row and column, as colours; NaN stays blank. Unnamed ones are numbered.

    limits: numbers of the first and the last colour; None: the smallest and the largest there are.
    """

    title: str
    x_label: str
    y_label: str
    values: Sequence[Sequence[float]]
    color_label: str
    color_scale: Scale = "linear"
    row_names: Sequence[str] = ()
    column_names: Sequence[str] = ()
    limits: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not self.values or len({len(row) for row in self.values}) != 1:
            raise ValueError(f"the grid {self.title!r} needs rows of one length")
        for names, count in (
            (self.row_names, len(self.values)),
            (self.column_names, len(self.values[0])),
        ):
            if names and len(names) != count:
                raise ValueError(f"the grid {self.title!r} names {len(names)} of {count}")


Panel = PlotPanel | GridPanel


@dataclass(frozen=True)
class Figure:
    """One picture.

    name: of its file, without suffix (small letters, digits, hyphens); caption: one sentence.
    """

    name: str
    caption: str
    panels: Sequence[Panel]
    n_columns: int = 2

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"a figure's name is small letters, digits and hyphens: {self.name!r}")
        if not self.panels or self.n_columns < 1:
            raise ValueError(f"the figure {self.name!r} has no panels")

    @property
    def n_rows(self) -> int:
        """Rows of panels."""
        return math.ceil(len(self.panels) / self.n_columns)
