"""One document in one layer, as retention sees it: a context coded once, and the horizon after it.

tokens [0, n_context) are the context; queries at positions
[n_context - window, n_context)  are the window: what the allocator may look at,
[n_context, n_tokens)            are the horizon: the future, which reads the coded context and
                                 the dense rest; at most HORIZON_QUERIES of them are asked.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from sphkv_cli.allocation.attention_utility import LayerGeometry, TokenUtility, token_utility
from sphkv_cli.artifacts.capture import CaptureReader, DocumentInfo
from sphkv_cli.errors import UsageError
from sphkv_cli.fit.captured_vectors import read_vectors
from sphkv_codebooks.frame import FrameSet

HORIZON_QUERIES = 128


@dataclass(frozen=True)
class Split:
    """How a document is cut: tokens of context, queries (rows of the capture) of each part."""

    n_context: int
    window_rows: slice
    horizon_rows: slice


def split_document(
    capture: CaptureReader, document: DocumentInfo, *, horizon: int, window: int
) -> Split:
    """Cut a document by positions.

    Args:
        horizon: tokens after the context.
        window: positions at the end of the context whose queries are looked at.

    Raises:
        UsageError: the document leaves no context, or no captured query lies in a part.
    """
    n_context = document.n_tokens - horizon
    if n_context < window:
        raise UsageError(
            f"document {document.name!r} has {document.n_tokens} tokens; horizon {horizon} and "
            f"window {window} need {horizon + window}",
            "capture longer documents, or lower --horizon or --window",
        )
    positions = capture.query_positions(document)
    first, last = positions.searchsorted([n_context - window, n_context])
    if first == last or last == positions.size:
        part = "the window before" if first == last else "the horizon after"
        raise UsageError(
            f"document {document.name!r} has no captured query in {part} token {n_context}",
            "capture with denser queries, or widen --window or --horizon",
        )
    # Evenly spaced: neighbours ask for nearly the same, and cost as much.
    step = -(-(positions.size - int(last)) // HORIZON_QUERIES)
    horizon_rows = slice(int(last), int(positions.size), step)
    return Split(n_context, slice(int(first), int(last)), horizon_rows)


@dataclass(frozen=True)
class LayerContext:
    """Arrays of one document and layer; `_framed` ones are in the codes' frame.

    queries: (n_queries, n_q_heads, head_dim) as captured; keys, values: (n_tokens, n_kv_heads,
    head_dim); positions: (n_queries) int64; head_weights: (n_q_heads) F.
    """

    layer: int
    split: Split
    geometry: LayerGeometry
    head_weights: Tensor
    positions: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    queries_framed: Tensor
    keys_framed: Tensor
    values_framed: Tensor

    @property
    def n_context(self) -> int:
        return self.split.n_context

    @cached_property
    def window_utility(self) -> TokenUtility:
        """Utility for the window's queries: per token the mean over those that see it."""
        return self._utility(self.split.window_rows, self.n_context, "seeing")

    @cached_property
    def horizon_utility(self) -> TokenUtility:
        """True future utility: the mean over the horizon's queries, which see the rest dense."""
        return self._utility(self.split.horizon_rows, self.keys.shape[0], "all")

    def reach(self) -> Tensor:
        """(n_context) float64: fraction of the positions after the context that can see a token."""
        n_tokens = self.keys.shape[0]
        if self.geometry.window == 0:
            return torch.ones(self.n_context, dtype=torch.float64)
        # The first query after the context sees the last window - 1 tokens, the next one less.
        left = torch.arange(self.n_context) + self.geometry.window - self.n_context
        horizon = n_tokens - self.n_context
        return left.clamp(0, horizon).to(torch.float64) / horizon

    def seen_in_window(self) -> Tensor:
        """(n_context) bool: whether some query of the window sees the token at all."""
        last = int(self.positions[self.split.window_rows][-1])
        return torch.arange(self.n_context) <= last

    def _utility(
        self, rows: slice, n_tokens: int, mean_over: Literal["all", "seeing"]
    ) -> TokenUtility:
        return token_utility(
            self.queries[rows],
            (self.queries_framed[rows].to(torch.float64) ** 2).sum(-1),
            self.positions[rows],
            self.keys[:n_tokens],
            self.values[:n_tokens],
            self.head_weights,
            self.geometry,
            n_context=self.n_context,
            mean_over=mean_over,
        )


def read_context(
    capture: CaptureReader,
    document: DocumentInfo,
    layer: int,
    split: Split,
    frames: FrameSet,
    head_weights: Tensor,
) -> LayerContext:
    """Read one document and layer, and put it into its frame.

    Raises:
        SphkvError: NaN or Inf in the capture; names layer, head and document.
    """
    queries = read_vectors(capture, document, layer, "queries")
    keys = read_vectors(capture, document, layer, "keys")
    values = read_vectors(capture, document, layer, "values")
    info = capture.layers[layer]
    return LayerContext(
        layer=layer,
        split=split,
        geometry=LayerGeometry(info.softmax_scale, info.window, info.logit_softcap),
        head_weights=head_weights,
        positions=torch.from_numpy(capture.query_positions(document)),
        queries=queries,
        keys=keys,
        values=values,
        queries_framed=frames.queries_to_frame(layer, queries),
        keys_framed=frames.keys_to_frame(layer, keys, torch.arange(keys.shape[0])),
        values_framed=frames.values_to_frame(values),
    )
