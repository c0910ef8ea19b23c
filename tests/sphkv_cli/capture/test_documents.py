"""Cutting and splitting: documents, never tokens; no text is both learned from and judged on."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphkv_cli.artifacts.capture_info import SPLITS
from sphkv_cli.capture.documents import plan_documents, query_positions, share_out
from sphkv_cli.capture.options import TextSource
from sphkv_cli.capture.text import Text, read_texts
from sphkv_cli.errors import SphkvError, UsageError


def text(name: str, n_tokens: int, split: str | None = None, *, is_row: bool = False) -> Text:
    """A text of `n_tokens` characters, each a token, different for every name."""
    start = sum(map(ord, name))
    content = "".join(chr(256 + (start + i * i) % 5000) for i in range(n_tokens))
    return Text(name, content, split, is_row)  # type: ignore[arg-type]


def plan(texts: list[Text], **changes: object) -> tuple[list, tuple[str, ...]]:
    options = {
        "document_tokens": 10,
        "max_tokens": None,
        "min_tokens": 4,
        "query_stride": 3,
        "query_tail": 4,
    }
    documents, notes = plan_documents(
        texts,
        lambda content: [ord(c) for c in content],
        **options | changes,  # type: ignore[arg-type]
    )
    return list(documents), notes


def test_three_texts_are_split_by_text() -> None:
    documents, _ = plan([text("a", 45), text("b", 30), text("c", 38)])
    assert Counter((d.info.split, d.info.source) for d in documents) == {
        ("fit", "a"): 4,
        ("select", "b"): 3,
        ("judge", "c"): 3,
    }


def test_one_text_is_split_by_document_in_order_and_says_so() -> None:
    documents, notes = plan([text("a", 100)])
    assert [d.info.split for d in documents] == ["fit"] * 5 + ["select"] * 2 + ["judge"] * 3
    assert [d.info.first_token for d in documents] == list(range(0, 100, 10))
    assert "different splits" in notes[0]


def test_documents_are_the_text_in_order_without_overlap() -> None:
    source = text("a", 47)
    documents, _ = plan([source])
    ids = np.concatenate([d.token_ids for d in documents])
    assert ids.tolist() == [ord(c) for c in source.content[:40]]


def test_every_document_starts_with_the_prefix() -> None:
    documents, _ = plan([text("a", 40)], prefix=(7,))
    assert all(d.token_ids[0] == 7 and d.info.n_tokens == 10 for d in documents)
    assert [d.info.first_token for d in documents] == [0, 9, 18, 27]


def test_a_limit_keeps_every_split_and_spreads_over_the_text() -> None:
    documents, _ = plan([text("a", 200), text("b", 200), text("c", 200)], max_tokens=89)
    assert Counter(d.info.split for d in documents) == {"fit": 4, "select": 2, "judge": 2}
    assert sum(d.info.n_tokens for d in documents) <= 89
    assert [d.info.first_token for d in documents] == [0, 50, 100, 150, 0, 100, 0, 100]


def test_rows_keep_their_own_split_and_short_rows_are_counted() -> None:
    rows = [
        text("r1", 8, "judge", is_row=True),
        text("r2", 3, "fit", is_row=True),
        text("r3", 9, "fit", is_row=True),
        text("r4", 25, "select", is_row=True),
    ]
    documents, notes = plan(rows)
    assert [(d.info.split, d.info.source, d.info.n_tokens) for d in documents] == [
        ("fit", "r3", 9),
        ("select", "r4", 10),
        ("select", "r4", 10),
        ("judge", "r1", 8),
    ]
    assert notes == ("1 rows of fewer than 4 tokens were left out",)


def test_a_short_text_is_refused_by_name() -> None:
    with pytest.raises(SphkvError, match=r"b has 3 tokens, fewer than one window of 4"):
        plan([text("a", 50), text("b", 3)])


def test_fewer_than_three_documents_are_refused() -> None:
    with pytest.raises(SphkvError, match="make 2 documents"):
        plan([text("a", 20)])


def test_splits_are_said_by_all_texts_or_by_none() -> None:
    with pytest.raises(UsageError, match="c does not say its split"):
        plan([text("a", 20, "fit"), text("b", 20, "judge"), text("c", 20)])
    with pytest.raises(UsageError, match="no text for select"):
        plan([text("a", 20, "fit"), text("b", 20, "judge")])


def test_the_same_text_is_not_fitted_and_judged() -> None:
    twin = text("a", 20)
    with pytest.raises(UsageError, match="are the same text"):
        plan([twin, text("b", 20), Text("copy", twin.content, None, is_row=False)])


@given(n=st.integers(3, 500))
def test_shares_sum_and_leave_nobody_out(n: int) -> None:
    counts = share_out(n)
    assert sum(counts.values()) == n
    assert min(counts.values()) >= 1
    for split, share in zip(SPLITS, (0.5, 0.2, 0.3), strict=True):
        # One thing of rounding, and one that the other two may have needed.
        assert abs(counts[split] - n * share) <= 2


@given(n=st.integers(1, 300), stride=st.integers(1, 50), tail=st.integers(1, 80))
def test_queries_keep_the_tail_and_every_stride_from_the_end(
    n: int, stride: int, tail: int
) -> None:
    positions = query_positions(n, stride=stride, tail=tail)
    expected = [p for p in range(n) if p >= n - tail or (n - 1 - p) % stride == 0]
    assert positions.tolist() == expected


@given(n=st.integers(1, 200), added=st.integers(0, 50), stride=st.integers(1, 9))
def test_queries_do_not_move_when_text_is_put_in_front(n: int, added: int, stride: int) -> None:
    short = query_positions(n, stride=stride, tail=5)
    long = query_positions(n + added, stride=stride, tail=5)
    assert (long[long >= added] - added).tolist() == short.tolist()


def test_rows_that_are_all_too_short_say_so() -> None:
    rows = [text(f"r{i}", 3, is_row=True) for i in range(5)]
    with pytest.raises(SphkvError, match=r"all 5 rows have fewer than 4 tokens.*--min-tokens"):
        plan(rows)


@pytest.mark.parametrize("argument", ["", "fit=", "judge="])
def test_a_text_without_a_path_is_refused(argument: str) -> None:
    with pytest.raises(UsageError, match="names no file"):
        TextSource.parse(argument)


def test_a_split_that_there_is_not_is_named(tmp_path: Path) -> None:
    source = TextSource.parse(f"foo={tmp_path / 'a.txt'}")
    with pytest.raises(SphkvError, match=r"does not exist.*fit=, select=, judge="):
        list(read_texts((source,), jsonl_field="text"))
