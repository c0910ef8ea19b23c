"""One document in one layer, in the frame and in float64: what every candidate is measured on.

    tokens [0, n_context)         the context, coded once
    tokens [n_context, n_tokens)  the horizon: dense; its captured queries read the coded context
                                  and the dense rest, causally

With k' = S A (k_t - c_t), q' = S A^-T q, v' = S v the logit is q.k_t = q'.k' + q.c_t exactly, and
an output error has the same length in the frame as outside: S is orthogonal.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_cli.artifacts.allocation import PlanInfo
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.errors import SphkvError
from sphkv_cli.fit.captured_vectors import read_vectors
from sphkv_codebooks.frame import FrameSet
from sphkv_kernels.position_term import PositionTerm


@dataclass(frozen=True)
class LayerInputs:
    """queries: ``(n_queries, n_q_heads, head_dim)`` at positions ``(n_queries)``; logit_offset:
    ``(n_queries, n_q_heads)`` q.c, of a c that every position shares; position_term: q.c_t of one
    that depends on it, a row per query, or None; keys, values: ``(n_tokens, n_kv_heads,
    head_dim)``; all of them float64 in the frame.  code_keys, code_values: the context's,
    ``(n_context, ...) float32``, as an encoder is given them.  seen: ``(n_queries, n_tokens)
    bool``, causal and inside the window.
    """

    layer: int
    n_context: int
    softmax_scale: float
    logit_softcap: float
    window: int
    queries: Tensor
    positions: Tensor
    logit_offset: Tensor
    keys: Tensor
    values: Tensor
    code_keys: Tensor
    code_values: Tensor
    seen: Tensor
    position_term: PositionTerm | None = None

    @property
    def n_kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def group_size(self) -> int:
        return self.queries.shape[1] // self.n_kv_heads

    def head_queries(self, kv_head: int) -> Tensor:
        """``(group_size, n_queries, head_dim)`` of one KV head's query heads."""
        heads = slice(kv_head * self.group_size, (kv_head + 1) * self.group_size)
        return self.queries[:, heads].transpose(0, 1)

    def head_offset(self, kv_head: int, tokens: Tensor) -> Tensor:
        """q.c_t at the positions ``(n_tokens)``: ``(group_size, n_queries, n_tokens or 1)``."""
        heads = slice(kv_head * self.group_size, (kv_head + 1) * self.group_size)
        offset = self.logit_offset[:, heads].T[..., None]
        if self.position_term is None:
            return offset
        n_queries = self.queries.shape[0]
        rows = torch.arange(n_queries) * self.n_kv_heads + kv_head
        term = self.position_term.logits(rows, tokens.expand(n_queries, -1))
        return offset + term.transpose(0, 1)


def horizon_rows(capture: CaptureReader, document: PlanInfo, max_queries: int) -> Tensor:
    """Rows of the captured queries after the context, evenly thinned to at most max_queries.

    Raises:
        SphkvError: no query was captured there.
    """
    positions = torch.from_numpy(capture.query_positions(document.index))
    rows = torch.nonzero(positions >= document.n_context).flatten()
    if rows.numel() == 0:
        raise SphkvError(
            f"document {document.name!r} has no captured query after token {document.n_context}",
            "capture with denser queries and allocate again",
        )
    step = -(-rows.numel() // max_queries)
    return rows[::step]


def read_layer(
    capture: CaptureReader, document: PlanInfo, layer: int, rows: Tensor, frames: FrameSet
) -> LayerInputs:
    """Read one document and layer into its frame.

    Raises:
        SphkvError: NaN or Inf in the capture; names document, layer and head.
    """
    whole = capture.documents[document.index]
    queries = read_vectors(capture, whole, layer, "queries")[rows]
    keys = read_vectors(capture, whole, layer, "keys")
    values = read_vectors(capture, whole, layer, "values")
    positions = torch.from_numpy(capture.query_positions(document.index))[rows]
    info = capture.layers[layer]
    distance = positions[:, None] - torch.arange(keys.shape[0])
    seen = distance >= 0
    if info.window > 0:
        seen &= distance < info.window
    exact_queries = queries.to(torch.float64)
    every = torch.arange(keys.shape[0])
    n_context = document.n_context
    return LayerInputs(
        layer=layer,
        n_context=n_context,
        softmax_scale=info.softmax_scale,
        logit_softcap=info.logit_softcap,
        window=info.window,
        queries=frames.queries_to_frame(layer, exact_queries),
        positions=positions,
        logit_offset=frames.logit_offset(layer, exact_queries),
        keys=frames.keys_to_frame(layer, keys.to(torch.float64), every),
        values=frames.values_to_frame(values.to(torch.float64)),
        code_keys=frames.keys_to_frame(layer, keys[:n_context], every[:n_context]),
        code_values=frames.values_to_frame(values[:n_context]),
        seen=seen,
        position_term=PositionTerm.of(frames, layer, exact_queries),
    )
