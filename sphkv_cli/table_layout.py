"""How a table fits a terminal: a number is never broken, headers and text break between words.

Headers shrink first, as a line more of them is one line; then text, the widest column first. A
table that is still too wide stands in several parts, one below the other, each with the text
columns that name its rows.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from rich.cells import cell_len, chop_cells

from sphkv_cli.blocks import Table, cell_text

_WORDS = re.compile(r"\S+\s*|\s+")
_PIECES = re.compile(r"[^/_]*[/_]|[^/_]+")


@dataclass(frozen=True)
class Column:
    """One column as printed: no line of its header and cells is wider than `width`."""

    header: str
    cells: tuple[str, ...]
    is_text: bool
    width: int

    def narrowed(self, width: int) -> "Column":
        """This column at `width`, its text and header folded."""
        cells = tuple(folded(cell, width) for cell in self.cells) if self.is_text else self.cells
        return replace(self, header=folded(self.header, width), cells=cells, width=width)


def table_width(widths: Sequence[int]) -> int:
    """Of a table as rich draws it: two blanks at either end, three between columns."""
    return sum(widths) + 3 * len(widths) + 1


def parts_of(table: Table, width: int | None) -> list[list[Column]]:
    """The columns of each part of `table`, at most `width` wide together where numbers let them.

    width: of the terminal; None is no limit, and one part.
    """
    columns = _columns(table)
    if width is None:
        return [columns]
    least = [_least_width(column, width // (2 * max(table.text_columns, 1))) for column in columns]
    parts = _split(least, table.text_columns, width)
    # As many parts of about equal width.
    for limit in range(width):
        even = _split(least, table.text_columns, limit)
        if len(even) == len(parts):
            parts = even
            break
    return [_fitted([columns[i] for i in part], [least[i] for i in part], width) for part in parts]


def _split(least: Sequence[int], n_names: int, width: int) -> list[list[int]]:
    """Columns of each part: the first n_names, and as many others as `width` holds, or one."""
    names = list(range(n_names))
    parts = [names.copy()]
    for index in range(n_names, len(least)):
        if parts[-1] != names and table_width([least[i] for i in (*parts[-1], index)]) > width:
            parts.append(names.copy())
        parts[-1].append(index)
    return parts


def folded(text: str, width: int) -> str:
    """`text` on lines of `width`: broken at spaces, else after / and _, else anywhere."""
    lines = [""]

    def add(piece: str, smaller: Iterable[str]) -> None:
        if cell_len((lines[-1] + piece).rstrip()) <= width:
            lines[-1] += piece
        elif cell_len(piece.rstrip()) <= width:
            lines.append(piece)
        else:
            for part in smaller:
                add(part, chop_cells(part, width))

    for word in _WORDS.findall(text):
        add(word, _PIECES.findall(word))
    return "\n".join(line.rstrip() for line in lines)


def _columns(table: Table) -> list[Column]:
    columns = []
    for index, header in enumerate(table.columns):
        cells = tuple(cell_text(row[index]) for row in table.rows)
        width = max(map(cell_len, (header, *cells)))
        columns.append(Column(header, cells, index < table.text_columns, width))
    return columns


def _least_width(column: Column, most_of_text: int) -> int:
    """The longest piece of its header and text; a longer piece than `most_of_text` breaks too."""
    if column.is_text:
        return max(1, min(_longest_piece((column.header, *column.cells)), most_of_text))
    return max(map(cell_len, (*column.cells, *_pieces(column.header))), default=0)


def _longest_piece(texts: Iterable[str]) -> int:
    return max(map(cell_len, chain.from_iterable(map(_pieces, texts))), default=0)


def _pieces(text: str) -> list[str]:
    return [piece.rstrip() for word in _WORDS.findall(text) for piece in _PIECES.findall(word)]


def _fitted(columns: list[Column], least: list[int], width: int) -> list[Column]:
    widths = [column.width for column in columns]
    for is_text in (False, True):
        while table_width(widths) > width:
            shrinkable = [
                i
                for i, column in enumerate(columns)
                if column.is_text == is_text and widths[i] > least[i]
            ]
            if not shrinkable:
                break
            widths[max(shrinkable, key=lambda i: widths[i])] -= 1
    return [column.narrowed(w) for column, w in zip(columns, widths, strict=True)]
