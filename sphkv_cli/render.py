"""Results as tables for people or JSON for programs: stdout has the result, stderr the progress."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

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
from rich.table import Table as RichTable
from rich.text import Text

from sphkv_cli.blocks import Block, Line
from sphkv_cli.table_layout import Column, parts_of, table_width


class TerminalProgress:
    """Rate and time left on stderr, only where stderr is a terminal.

    A `with` block removes the bar and gives the cursor back when a stage fails or is interrupted.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: RichProgress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

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


class Output:
    """The one place that writes to stdout."""

    def __init__(self, json_only: bool) -> None:
        self._json_only = json_only
        self._is_terminal = sys.stdout.isatty()
        self._console = Console(highlight=False)

    def show(self, result: object, blocks: Sequence[Block]) -> None:
        """Print `result` as one JSON document, or `blocks` for people."""
        if self._json_only:
            sys.stdout.write(json.dumps(plain(result), indent=2) + "\n")
            return
        for block in blocks:
            if isinstance(block, Line):
                self._console.print(escape(block.text), soft_wrap=True)
                continue
            # As the table's own title it would be folded to the table's width.
            self._console.print(escape(block.title), style="bold", soft_wrap=True)
            # What goes to a file is as wide as it is.
            for part in parts_of(block, self._console.width if self._is_terminal else None):
                self._print(part)

    def _print(self, part: Sequence[Column]) -> None:
        drawn = _drawn(part)
        if self._is_terminal:
            self._console.print(drawn, crop=False)
            return
        # rich pads every line of a table to the width of its widest.
        with self._console.capture() as captured:
            self._console.print(drawn, crop=False)
        sys.stdout.write("".join(f"{one.rstrip()}\n" for one in captured.get().splitlines()))


def _drawn(part: Sequence[Column]) -> RichTable:
    table = RichTable(box=box.SIMPLE_HEAD, width=table_width([column.width for column in part]))
    for column in part:
        table.add_column(
            Text(column.header),
            justify="left" if column.is_text else "right",
            width=column.width,
        )
    for row in zip(*(column.cells for column in part), strict=True):
        table.add_row(*map(Text, row))
    return table
