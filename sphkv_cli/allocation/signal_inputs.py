"""What the signals of one layer share: attention of the context's own queries, horizon positions.

Captured queries may be sparse: each stands for the positions since the one before it, and the very
last tokens, which none of them saw, are filled in from the window.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sphkv_cli.allocation.attention_utility import attention, visible
from sphkv_cli.allocation.context import LayerContext
from sphkv_cli.allocation.future_queries import FutureQueries

_QUERY_BLOCK = 256


@dataclass(frozen=True)
class SignalInputs:
    """One layer of one context, with what the signals share; future: for those that need it."""

    context: LayerContext
    future: FutureQueries | None

    @property
    def n_kv_heads(self) -> int:
        return self.context.keys.shape[1]

    @cached_property
    def attention(self) -> "SummedAttention":
        """Of all queries of the context; each stands for the positions since the one before it."""
        rows = slice(0, self.context.split.window_rows.stop)
        positions = self.context.positions[rows]
        gaps = torch.diff(positions, prepend=positions.new_tensor([-1])).double()
        return SummedAttention.of(self.context, rows, gaps)

    @cached_property
    def window_attention(self) -> Tensor:
        """Mean over the window's queries that see the token, (n_kv_heads, n_context)."""
        return self._mean_from(window_start(self.context))

    @cached_property
    def half_window_attention(self) -> Tensor:
        """The same over the window's later half."""
        return self._mean_from(half_start(self.context))

    def _mean_from(self, start: int) -> Tensor:
        stop = self.context.split.window_rows.stop
        first = int((self.context.positions[:stop] < start).sum())
        equal = torch.ones(stop - first, dtype=torch.float64)
        found = SummedAttention.of(self.context, slice(first, stop), equal)
        return filled(self.context, found.means, start)

    @property
    def queries(self) -> FutureQueries:
        """Future queries.

        Raises:
            ValueError: there are none; a programming error, since `Signal.needs_future` says so.
        """
        if self.future is None:
            raise ValueError("this signal needs the queries of the fit documents")
        return self.future

    def horizon_positions(self, count: int) -> Tensor:
        """(count) positions, evenly over the horizon."""
        n_context = self.context.n_context
        horizon = self.context.keys.shape[0] - n_context
        steps = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        return n_context + (steps * horizon).long()


@dataclass(frozen=True)
class SummedAttention:
    """sums: (n_kv_heads, n_context) sum of weight x p over queries and the group's heads; seeing:
    (n_context) sum of the weights of the queries that see the token; float64."""

    sums: Tensor
    seeing: Tensor

    @property
    def means(self) -> Tensor:
        """Over the queries that see a token."""
        return self.sums / self.seeing.clamp(min=1)

    @staticmethod
    def of(context: LayerContext, rows: slice, weights: Tensor) -> "SummedAttention":
        """Attend a block of queries at a time.

        Args:
            rows: queries of the context; weights: (n_rows) float64, one for each.
        """
        n_context, n_kv_heads = context.n_context, context.keys.shape[1]
        group_size = context.queries.shape[1] // n_kv_heads
        sums = torch.zeros(n_kv_heads, n_context, dtype=torch.float64)
        seeing = torch.zeros(n_context, dtype=torch.float64)
        for first in range(rows.start, rows.stop, _QUERY_BLOCK):
            block = slice(first, min(first + _QUERY_BLOCK, rows.stop))
            weight = weights[first - rows.start : block.stop - rows.start]
            seen = visible(context.positions[block], n_context, context.geometry.window)
            seeing += weight @ seen.double()
            for kv_head in range(n_kv_heads):
                heads = slice(kv_head * group_size, (kv_head + 1) * group_size)
                q = context.queries[block, heads].double().transpose(0, 1)
                k = context.keys[:n_context, kv_head].double()
                p, _ = attention(q, k, ~seen, context.geometry)
                sums[kv_head] += weight @ p.sum(0)
        return SummedAttention(sums, seeing)


def filled(context: LayerContext, scores: Tensor, start: int) -> Tensor:
    """The very last tokens, which no captured query saw, score like the window's mean."""
    unseen = ~context.seen_in_window()
    if not bool(unseen.any()):
        return scores
    filled = scores.clone()
    filled[:, unseen] = scores[:, start:][:, ~unseen[start:]].mean(dim=1, keepdim=True)
    return filled


def window_start(context: LayerContext) -> int:
    """First captured position of the window."""
    return int(context.positions[context.split.window_rows][0])


def half_start(context: LayerContext) -> int:
    """First captured position of the window's later half, or that of its last query."""
    positions = context.positions[context.split.window_rows]
    later = positions[positions >= (int(positions[0]) + context.n_context) // 2]
    return int(later[0] if later.numel() else positions[-1])
