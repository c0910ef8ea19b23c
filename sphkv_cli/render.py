"""Results as tables for people or JSON for programs: stdout has the result, stderr the progress."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from sphkv_cli.doctor.checks import Diagnosis
from sphkv_cli.inspection.stage import Inspection


class TerminalProgress:
    """Rate and time left on stderr, only where stderr is a terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: RichProgress | None = None

    def start(self, description: str, total: float | None, unit: str) -> None:
        """Show a bar for one phase."""
        self.finish()
        if not self._console.is_terminal:
            return
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(unit),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._bar.add_task(description, total=total)
        self._bar.start()

    def advance(self, amount: float = 1.0) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], amount)

    def finish(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {self._unit}/s" if speed else f"- {self._unit}/s")


def plain(value: Any) -> Any:
    """A result as JSON-able Python: dataclasses, paths, arrays and infinities included."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # JSON has no infinity
    raise TypeError(f"no JSON form for {type(value).__name__}")


def bytes_text(n_bytes: float) -> str:
    """Bytes with a binary unit: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024 or unit == "GiB":
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    raise AssertionError


class Output:
    """The one place that writes to stdout."""

    def __init__(self, json_only: bool) -> None:
        self._json_only = json_only
        # A table is not folded to 80 columns when it goes to a file.
        width = None if sys.stdout.isatty() else 140
        self._console = Console(width=width, highlight=False, soft_wrap=False)

    def line(self, text: str = "") -> None:
        """One line of plain text."""
        self._console.print(escape(text), soft_wrap=True)

    def json(self, value: Any) -> None:
        """One JSON document."""
        sys.stdout.write(json.dumps(plain(value), indent=2) + "\n")

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[object]],
        *,
        text_columns: int = 1,
    ) -> None:
        """A table; the first `text_columns` columns are left-aligned, the others right."""
        table = Table(
            title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
        )
        for index, column in enumerate(columns):
            justify = "left" if index < text_columns else "right"
            table.add_column(escape(column), justify=justify, overflow="fold")  # type: ignore[arg-type]
        for row in rows:
            table.add_row(*(escape(cell_text(cell)) for cell in row))
        self._console.print(table)

    def diagnosis(self, diagnosis: Diagnosis) -> None:
        """`sphkv doctor`."""
        if self._json_only:
            return self.json(diagnosis)
        self.table(
            "This environment",
            ("what", "", "found", "to mend it"),
            [
                (check.subject, "ok" if check.ok else "no", check.finding, check.mend)
                for check in diagnosis.checks
            ],
            text_columns=4,
        )
        self.table(
            "What it can run",
            ("command", "", "because"),
            [(c.command, "yes" if c.ok else "no", c.because) for c in diagnosis.capabilities],
            text_columns=3,
        )

    def inspection(self, result: Inspection) -> None:
        """`sphkv inspect`."""
        if self._json_only:
            return self.json(result)
        header = result.header
        self.line(f"{result.path}: {header.kind}, format version {header.version}")
        self.line(f"digest      {header.digest}{_digest_note(result.digest_ok)}")
        for role, ref in header.inputs.items():
            self.line(f"made from   {role} {ref.file_name}, digest {ref.digest[:12]}")
        for key, value in header.provenance.items():
            self.line(f"{key:<11} {_compact(value)}")
        self.table(
            "Attributes",
            ("name", "value"),
            [(key, _compact(value)) for key, value in result.attributes.items()],
            text_columns=2,
        )
        self.table(
            f"Datasets ({bytes_text(result.file_bytes)} on disk)",
            ("name", "axes", "type", "shape", "count", "bytes"),
            [
                (
                    d.name,
                    d.axes,
                    d.dtype,
                    " x ".join(map(str, d.shape)),
                    d.count,
                    bytes_text(d.n_bytes),
                )
                for d in result.datasets
            ],
            text_columns=3,
        )


def cell_text(cell: object) -> str:
    """A table cell: floats with four significant digits."""
    if isinstance(cell, float):
        return "-" if math.isnan(cell) else f"{cell:.4g}"
    return str(cell)


def _digest_note(digest_ok: bool | None) -> str:
    if digest_ok is None:
        return ""
    return " (verified)" if digest_ok else " DOES NOT MATCH THE CONTENT: the file was changed"


def _compact(value: Any, limit: int = 160) -> str:
    text = value if isinstance(value, str) else json.dumps(plain(value))
    return text if len(text) <= limit else text[: limit - 4] + " ..."
