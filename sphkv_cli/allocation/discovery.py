"""What the solver found by itself: sinks, a recency profile, and where heads get their bytes.

Nothing is pinned, so where bits concentrate is a finding.  Positions are counted from both ends of
the context in bins that double in width; a token is *protected* where its page is at 8 bits a
coordinate or more (int8, dense), and a *sink* if at least half of all heads protect it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sphkv_cli.allocation.layout import PageLayout

Float = NDArray[np.float64]

PROTECTED_BITS = 8.0
SINK_SHARE = 0.5
MOST_SINKS = 8


@dataclass(frozen=True)
class PositionRow:
    """Tokens [first, last] from one end of the context, means over heads and documents.

    end: "start" or "end"; bits_per_coordinate: of their pages; dropped, protected: shares.
    """

    end: str
    first: int
    last: int
    bits_per_coordinate: float
    dropped: float
    protected: float


@dataclass(frozen=True)
class SinkRow:
    """A token that at least half of all heads protect; share: how many do."""

    document: str
    position: int
    share: float


@dataclass(frozen=True)
class Discovery:
    """positions: both ends; sinks: per document the most protected, by falling share; n_sinks: of
    all documents together."""

    positions: tuple[PositionRow, ...]
    sinks: tuple[SinkRow, ...]
    n_sinks: int

    @staticmethod
    def of_plans(
        layout: PageLayout, names: Sequence[str], plans: Sequence[NDArray[np.int8]]
    ) -> "Discovery":
        """Of the options of all tokens.

        Args:
            names: of the documents; plans: (n_layers, n_kv_heads, n_context) each.
        """
        maps = [_TokenMap.of(layout, plan) for plan in plans]
        sinks: list[SinkRow] = []
        for name, found in zip(names, maps, strict=True):
            chosen = np.flatnonzero(found.protected >= SINK_SHARE)
            order = chosen[np.argsort(-found.protected[chosen], kind="stable")]
            sinks += [SinkRow(name, int(t), float(found.protected[t])) for t in order]
        shown: list[SinkRow] = []
        for name in names:
            shown += [row for row in sinks if row.document == name][:MOST_SINKS]
        return Discovery(
            (*_profile(maps, "start"), *_profile(maps, "end")), tuple(shown), len(sinks)
        )

    def profile(self, end: str) -> tuple[PositionRow, ...]:
        """The bins from one end, nearest first."""
        return tuple(row for row in self.positions if row.end == end)


@dataclass(frozen=True)
class _TokenMap:
    """Means over heads by position, (n_context) each."""

    bits: Float
    dropped: Float
    protected: Float

    @staticmethod
    def of(layout: PageLayout, plan: NDArray[np.int8]) -> "_TokenMap":
        sizes = layout.option_bytes()
        rates = 8 * sizes / (2 * layout.head_dim * layout.page_size)
        bits = np.stack([rates[layer][plan[layer]] for layer in range(layout.n_layers)])
        return _TokenMap(
            bits.mean(axis=(0, 1)),
            (plan == 0).mean(axis=(0, 1)),
            (bits >= PROTECTED_BITS).mean(axis=(0, 1)),
        )


def _profile(maps: Sequence[_TokenMap], end: str) -> list[PositionRow]:
    """Bins [0, 0], [1, 1], [2, 3], [4, 7] ... of the positions that every document has."""
    n = min(found.bits.size for found in maps)
    rows, first = [], 0
    while first < n:
        last = min(max(2 * first - 1, first), n - 1)
        columns = [
            np.mean([_span(getattr(found, name), end, first, last) for found in maps])
            for name in ("bits", "dropped", "protected")
        ]
        rows.append(PositionRow(end, first, last, *(float(column) for column in columns)))
        first = last + 1
    return rows


def _span(values: Float, end: str, first: int, last: int) -> float:
    counted = values if end == "start" else values[::-1]
    return float(counted[first : last + 1].mean())
