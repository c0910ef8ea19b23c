"""What goes to a file: tables are neither folded nor padded, and titles stand above them."""

import pytest

from sphkv_cli.blocks import Line, Table
from sphkv_cli.render import Output


def test_tables_in_a_file_are_not_folded(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"column {i} with a long name" for i in range(12)]
    title = "A title that is longer than " + "the table " * 40
    table = Table(title.strip(), tuple(names), [tuple(range(12))])
    narrow = Table(title.strip(), ("a",), [(1,)])
    Output(False).show(None, [table, narrow, Line("[bold] is text")])
    lines = capsys.readouterr().out.splitlines()
    assert all(line == line.rstrip() for line in lines)
    assert sum(line == title.strip() for line in lines) == 2
    (header,) = (line for line in lines if "column 0" in line)
    assert all(name in header for name in names)
    assert lines[-1] == "[bold] is text"
