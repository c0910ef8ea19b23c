"""What a terminal shows: numbers whole at any width, text broken between words, names repeated."""

import sys

import pytest

from sphkv_cli.blocks import Table
from sphkv_cli.render import Output
from sphkv_cli.table_layout import folded, parts_of, table_width

HEADERS = ("document", "split", "budget", "RoPE pairs", "worst head (root)", "bits/coordinate")
NAMES = ("pride_and_prejudice.txt#42", "emma.txt#0")
WIDE = Table(
    "Wide",
    (*HEADERS, *(f"level {level}" for level in range(9))),
    [(name, "judge", "540.0 KiB", 4, 0.03595, 1.25, *[0.001289] * 9) for name in NAMES],
    text_columns=2,
)


@pytest.mark.parametrize("width", [None, *range(30, 200, 7)])
def test_a_number_is_never_broken_and_no_column_is_lost(width: int | None) -> None:
    numbers = [
        (column.header.replace("\n", " "), column.cells)
        for part in parts_of(WIDE, width)
        for column in part[WIDE.text_columns :]
    ]
    assert [cells for _, cells in numbers] == [
        *[("540.0 KiB",) * 2, ("4",) * 2, ("0.03595",) * 2, ("1.25",) * 2],
        *[("0.001289",) * 2] * 9,
    ]
    assert [header.replace("/ ", "/") for header, _ in numbers] == list(WIDE.columns[2:])


@pytest.mark.parametrize("width", range(40, 200, 7))
def test_every_part_fits_and_names_its_rows(width: int) -> None:
    for part in parts_of(WIDE, width):
        assert table_width([column.width for column in part]) <= width
        assert [column.header for column in part[:2]] == ["document", "split"]
        assert tuple(name.replace("\n", "") for name in part[0].cells) == NAMES
        for column in part:
            lines = [line for cell in (column.header, *column.cells) for line in cell.split("\n")]
            assert max(map(len, lines)) <= column.width


def test_headers_shrink_before_names_and_names_before_the_table_is_split() -> None:
    table = Table("T", ("document", "RoPE pairs"), [(NAMES[0], 4)])
    whole = table_width([len(NAMES[0]), len("RoPE pairs")])
    assert [c.width for c in parts_of(table, whole)[0]] == [26, 10]
    assert [c.width for c in parts_of(table, whole - 5)[0]] == [26, 5]
    ((name, number),) = parts_of(table, whole - 6)
    assert (name.cells, number.header) == (("pride_and_\nprejudice.txt#42",), "RoPE\npairs")


def test_a_split_table_is_split_evenly() -> None:
    table = Table("T", ("a", *"bcdefg"), [("x", *[123456789] * 6)])
    assert [len(part) for part in parts_of(table, 1 + 4 + 5 * 12)] == [4, 4]


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("pride_and_prejudice.txt#0", 16, "pride_and_|prejudice.txt#0"),
        ("tables/heads/kv_head", 13, "tables/heads/|kv_head"),
        ("worst head", 5, "worst|head"),
        ("n_layers, n_kv_heads", 12, "n_layers,|n_kv_heads"),
        ("bits/coordinate", 15, "bits/coordinate"),
        ("0123456789abcdef", 6, "012345|6789ab|cdef"),
        ("漢字漢字", 4, "漢字|漢字"),
        ("", 4, ""),
    ],
)
def test_text_breaks_at_spaces_then_after_slashes_and_underscores(
    text: str, width: int, lines: str
) -> None:
    assert folded(text, width) == lines.replace("|", "\n")


def test_a_terminal_of_80_columns_shows_whole_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")  # 80 columns, no colours
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Output(False).show(None, [WIDE])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.count("0.001289") for line in lines) == 18
    assert lines.count("Wide") == 1
