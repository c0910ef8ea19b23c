"""What a command prints, as data: lines and tables. `render.py` draws them; stages make them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table; its first `text_columns` columns are left-aligned, the others right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    text_columns: int = 1

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"{self.title}: a row of {len(row)} in {len(self.columns)} columns"
                )


@dataclass(frozen=True)
class Line:
    """One line of text, never folded."""

    text: str = ""


Block = Table | Line


def cell_text(cell: object) -> str:
    """A table cell: floats with four significant digits, NaN and None as a dash."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def counted(count: int, what: str) -> str:
    """A number of things, "s" for more or fewer than one: '1 document', '2 documents'."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def times_text(factor: float, digits: int = 2) -> str:
    """So many digits, and no exponent from 10 to a billion: 1.3, 20, 160, 1,600."""
    text = f"{factor:.{digits}g}"
    return f"{float(text):,.0f}" if 10 ** (digits - 1) <= factor < 1e9 else text


def bytes_text(n_bytes: float) -> str:
    """Bytes with a binary unit: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"
