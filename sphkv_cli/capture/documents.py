"""Cuts texts into documents, and gives each document to fitting, selecting or judging.

Two laws. Documents are split, never tokens. And where there are at least three texts, the *texts*
are split: no book is both learned from and judged on. Without explicit splits the texts (or, with
fewer than three, the documents) are shared out in order, 50 % fit, 20 % select, 30 % judge, at
least one each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sphkv_cli.artifacts.capture_info import SPLITS, DocumentInfo, Split
from sphkv_cli.capture.text import Text
from sphkv_cli.errors import SphkvError, UsageError

SHARES: dict[Split, float] = {"fit": 0.5, "select": 0.2, "judge": 0.3}
Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PlannedDocument:
    """A document that will be captured: what is recorded of it, and its tokens."""

    info: DocumentInfo
    token_ids: Tokens
    query_positions: npt.NDArray[np.int32]


@dataclass(frozen=True)
class _Piece:
    text: Text
    number: int
    first_token: int
    token_ids: Tokens


def plan_documents(
    texts: Sequence[Text],
    tokenize: Callable[[str], Sequence[int]],
    *,
    document_tokens: int,
    max_tokens: int | None,
    min_tokens: int,
    query_stride: int,
    query_tail: int,
    prefix: Sequence[int] = (),
) -> tuple[tuple[PlannedDocument, ...], tuple[str, ...]]:
    """Documents in order of their split, and notes on what was left out.

    Args:
        texts: the sources.
        tokenize: text to token ids, without special tokens.
        prefix: special tokens that every document starts with (a BOS token, or nothing).

    Raises:
        SphkvError: a text is shorter than `min_tokens`, or there are fewer than three documents.
        UsageError: only some texts say their split, or the same text is in two splits.
    """
    notes: list[str] = []
    pieces: list[list[_Piece]] = []
    n_short = 0
    for text in texts:
        found = _cut(text, tokenize(text.content), document_tokens, min_tokens, prefix)
        if found:
            pieces.append(found)
        elif text.is_row:
            n_short += 1
        else:
            n_tokens = len(tokenize(text.content)) + len(prefix)
            raise SphkvError(
                f"{text.name} has {n_tokens} tokens, fewer than one window of {min_tokens}",
                "add text or lower --min-tokens",
            )
    if n_short:
        notes.append(f"{n_short} rows of fewer than {min_tokens} tokens were left out")
        if not pieces:
            raise SphkvError(
                f"all {n_short} rows have fewer than {min_tokens} tokens",
                "give longer ones or lower --min-tokens",
            )
    budget = None if max_tokens is None else max_tokens // document_tokens
    shared = assign_splits(pieces)
    chosen = _choose(shared, budget)
    if any(len(found) > 1 for found in pieces) and len(pieces) < len(SPLITS):
        notes.append("fewer than three texts: documents of one text are in different splits")
    _refuse_repeats(chosen)
    documents = []
    for index, (split, piece) in enumerate(chosen):
        positions = query_positions(len(piece.token_ids), stride=query_stride, tail=query_tail)
        info = DocumentInfo(
            index=index,
            name=f"{piece.text.name}#{piece.number}",
            split=split,
            n_tokens=len(piece.token_ids),
            n_queries=len(positions),
            source=piece.text.name,
            first_token=piece.first_token,
            text_sha256=piece.text.sha256,
        )
        documents.append(PlannedDocument(info, piece.token_ids, positions))
    return tuple(documents), tuple(notes)


def query_positions(n_tokens: int, *, stride: int, tail: int) -> npt.NDArray[np.int32]:
    """Which queries of a document are stored, ascending.

    Every one of the last `tail` positions, because the queries that judge a document (its horizon)
    and those that score its tokens (the last of its context) stand there; before them every
    `stride`-th, counted back from the end, so that the same positions are kept whatever is added in
    front. A document of at most `tail` tokens keeps every query.
    """
    back = np.arange(n_tokens)
    kept = (back < tail) | (back % stride == 0)
    return np.ascontiguousarray((n_tokens - 1 - back[kept])[::-1]).astype(np.int32)


def share_out(n: int) -> dict[Split, int]:
    """How many of `n` things each split gets: the shares rounded, at least one each, sum `n`."""
    counts: dict[Split, int] = {split: max(1, int(n * share)) for split, share in SHARES.items()}
    while sum(counts.values()) > n:
        counts[max(counts, key=lambda s: counts[s] - n * SHARES[s])] -= 1
    while sum(counts.values()) < n:
        counts[max(counts, key=lambda s: n * SHARES[s] - counts[s])] += 1
    return counts


def assign_splits(pieces: Sequence[Sequence[_Piece]]) -> dict[Split, list[list[_Piece]]]:
    """The pieces of every text by split: by the texts' own word, else by text, else by document."""
    shared: dict[Split, list[list[_Piece]]] = {split: [] for split in SPLITS}
    said = [found[0].text.split for found in pieces]
    if any(said):
        for found, split in zip(pieces, said, strict=True):
            if split is None:
                raise UsageError(
                    f"{found[0].text.name} does not say its split, others do",
                    "give all of them one (fit=, select=, judge=), or none",
                )
            shared[split].append(list(found))
        missing = [split for split in SPLITS if not shared[split]]
        if missing:
            raise UsageError(f"no text for {' and '.join(missing)}", "every split needs a document")
        return shared
    if len(pieces) >= len(SPLITS):
        units = [list(found) for found in pieces]
    else:
        units = [[piece] for found in pieces for piece in found]
    if len(units) < len(SPLITS):
        raise SphkvError(
            f"the texts make {len(units)} documents, fitting, selecting and judging need one each",
            "add text or lower --document-tokens",
        )
    start = 0
    for split, count in share_out(len(units)).items():
        shared[split] = _by_text(units[start : start + count])
        start += count
    return shared


def _by_text(units: Sequence[Sequence[_Piece]]) -> list[list[_Piece]]:
    """Join neighbouring units of the same text, so that a choice spreads over the text."""
    joined: list[list[_Piece]] = []
    for unit in units:
        if joined and joined[-1][0].text is unit[0].text:
            joined[-1].extend(unit)
        else:
            joined.append(list(unit))
    return joined


def _cut(
    text: Text,
    token_ids: Sequence[int],
    document_tokens: int,
    min_tokens: int,
    prefix: Sequence[int],
) -> list[_Piece]:
    """Whole documents; the rest of a text is kept when it is the only piece and long enough."""
    ids = np.asarray(token_ids, dtype=np.int32)
    head = np.asarray(prefix, dtype=np.int32)
    step = document_tokens - len(head)
    if len(ids) < step:
        whole = np.concatenate([head, ids])
        return [_Piece(text, 0, 0, whole)] if len(whole) >= min_tokens else []
    return [
        _Piece(text, number, first, np.concatenate([head, ids[first : first + step]]))
        for number, first in enumerate(range(0, len(ids) - step + 1, step))
    ]


def _choose(
    shared: dict[Split, list[list[_Piece]]], budget: int | None
) -> list[tuple[Split, _Piece]]:
    """At most `budget` documents, by share, spread evenly over each split's texts and each text."""
    available = {split: sum(map(len, units)) for split, units in shared.items()}
    counts = dict(available)
    if budget is not None and budget < sum(available.values()):
        counts = {split: min(available[split], n) for split, n in share_out(budget).items()}
    chosen: list[tuple[Split, _Piece]] = []
    for split, units in shared.items():
        quota = [0] * len(units)
        while sum(quota) < counts[split]:
            open_units = [i for i, unit in enumerate(units) if quota[i] < len(unit)]
            quota[min(open_units, key=lambda i: quota[i])] += 1
        for unit, n in zip(units, quota, strict=True):
            chosen.extend((split, unit[i * len(unit) // n]) for i in range(n))
    return chosen


def _refuse_repeats(chosen: Sequence[tuple[Split, _Piece]]) -> None:
    seen: dict[bytes, tuple[Split, str]] = {}
    for split, piece in chosen:
        key = piece.token_ids.tobytes()
        name = f"{piece.text.name}#{piece.number}"
        other_split, other = seen.setdefault(key, (split, name))
        if other_split != split:
            raise UsageError(
                f"{name} ({split}) and {other} ({other_split}) are the same text",
                "fitting, selecting and judging must not share a document",
            )
