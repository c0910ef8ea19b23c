"""What coding keys in a frame does to the output of attention, with window and sinks in place.

    o_i = sum_j softmax_j(l_ij) v_j,    l^_ij = l_ij + softmax_scale q'_i . (k'^_j - k'_j)
    error of a query head = sum_i ||o^_i - o_i||^2 / sum_i ||o_i||^2

Query i reads the key of token j coded iff j lies more than `window` tokens back, is none of the
first tokens and no sink; values are exact, because a frame rotates them all alike.  Errors are
really made, by one code, on queries of the `select` documents.  RoPE sees differences of positions
only, so a document is turned to a later place of a longer text without changing a logit: every
second one is, because means and moments of short documents may not hold there.  Ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.capture_info import LayerInfo
from sphkv_cli.evaluation.protocol import UniformProtocol
from sphkv_cli.fit.captured_vectors import documents_of, read_vectors
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotary import rotate
from sphkv_codebooks.spherical_code import SphericalCode

Float32Array = npt.NDArray[np.float32]
FloatArray = npt.NDArray[np.float64]

MAX_DOCUMENTS = 2
MAX_TOKENS = 2048
LATER = 7
"""Lengths of itself by which every second document is moved."""
QUERIES_PER_DOCUMENT = 40
"""A choice between frames compares them on the same queries, so few are enough."""


@dataclass(frozen=True, eq=False)
class _Document:
    """positions: (n_tokens) int64; queries: (n_queries, n_q_heads, head_dim); keys, values:
    (n_tokens, n_kv_heads, head_dim); logits: (n_kv_heads, group_size, n_queries, n_tokens) scaled;
    visible, coded: (n_queries, n_tokens) bool; exact: (n_kv_heads, group_size, n_queries,
    head_dim)."""

    positions: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    logits: Tensor
    visible: Tensor
    coded: Tensor
    exact: Tensor


@dataclass(frozen=True, eq=False)
class LayerJudge:
    """One layer of the select documents, attended densely."""

    info: LayerInfo
    documents: tuple[_Document, ...]

    @staticmethod
    def read(
        capture: CaptureReader,
        layer: int,
        protocol: UniformProtocol,
        inv_freq: Float32Array | None,
    ) -> "LayerJudge":
        """Read and attend; without inv_freq (head_dim / 2) documents stay where they are.

        Raises:
            SphkvError: no select document, or NaN or Inf among its vectors.
        """
        found = documents_of(capture, "select")
        chosen = found[:: -(-len(found) // MAX_DOCUMENTS)]
        info = capture.layers[layer]
        documents = []
        for index, document in enumerate(chosen):
            n_tokens = min(document.n_tokens, MAX_TOKENS)
            positions = capture.query_positions(document)
            usable = np.flatnonzero((positions >= protocol.first_scored) & (positions < n_tokens))
            if usable.size == 0:
                usable = np.flatnonzero(positions < n_tokens)
            rows = usable[:: -(-usable.size // QUERIES_PER_DOCUMENT)]
            at = torch.from_numpy(np.ascontiguousarray(positions[rows]))
            tokens = torch.arange(n_tokens)
            distance = at[:, None] - tokens
            visible = distance >= 0
            if info.window:
                visible &= distance < info.window
            coded = protocol.reads_coded(at, tokens) & visible
            queries = read_vectors(capture, document, layer, "queries")[torch.from_numpy(rows)]
            keys = read_vectors(capture, document, layer, "keys", slice(0, n_tokens))
            values = read_vectors(capture, document, layer, "values", slice(0, n_tokens))
            if index % 2 == 1 and inv_freq is not None:
                shift, frequencies = LATER * n_tokens, torch.from_numpy(np.array(inv_freq))
                queries = rotate(queries, torch.full((len(rows),), shift), frequencies)
                keys = rotate(keys, torch.full((n_tokens,), shift), frequencies)
                tokens = tokens + shift
            logits = _dots(queries, keys) * info.softmax_scale
            documents.append(
                _Document(
                    positions=tokens,
                    queries=queries,
                    keys=keys,
                    values=values,
                    logits=logits,
                    visible=visible,
                    coded=coded,
                    exact=_attend(logits, visible, values, info.logit_softcap),
                )
            )
        return LayerJudge(info, tuple(documents))

    def errors(
        self, frame: FrameSet, code: SphericalCode, thresholds: Sequence[Tensor]
    ) -> FloatArray:
        """Relative squared output errors, (n_thresholds, n_q_heads).

        frame: of this layer alone (its layer 0).  thresholds: (n_kv_heads) norms each, below which
        a key stays dense.
        """
        n_q_heads = self.documents[0].queries.shape[1]
        error = torch.zeros(len(thresholds), n_q_heads, dtype=torch.float64)
        output = torch.zeros(n_q_heads, dtype=torch.float64)
        for document in self.documents:
            framed = frame.keys_to_frame(0, document.keys, document.positions)
            made = code.decode(code.encode(framed)).to(framed.dtype) - framed
            change = _dots(frame.queries_to_frame(0, document.queries), made)
            change *= self.info.softmax_scale * document.coded
            output += _per_head(document.exact)
            norms = document.keys.norm(dim=-1)
            for index, threshold in enumerate(thresholds):
                is_coded = (norms >= threshold).T[:, None, None, :]
                coded = _attend(
                    document.logits + change * is_coded,
                    document.visible,
                    document.values,
                    self.info.logit_softcap,
                )
                error[index] += _per_head(coded - document.exact)
        relative: FloatArray = (error / output.clamp(min=torch.finfo(torch.float64).tiny)).numpy()
        return relative

    def sink_fraction(self, threshold: Tensor) -> float:
        """Share of the keys whose norm is below the threshold of their head."""
        below = [(d.keys.norm(dim=-1) < threshold).to(torch.float64) for d in self.documents]
        return float(torch.cat(below).mean())


def _dots(queries: Tensor, keys: Tensor) -> Tensor:
    """queries (n_queries, n_q_heads, head_dim), keys (n_tokens, n_kv_heads, head_dim) ->
    (n_kv_heads, group_size, n_queries, n_tokens)."""
    n_queries, n_q_heads, head_dim = queries.shape
    n_kv_heads = keys.shape[1]
    grouped = queries.reshape(n_queries, n_kv_heads, n_q_heads // n_kv_heads, head_dim)
    return grouped.permute(1, 2, 0, 3) @ keys.permute(1, 2, 0)[:, None]


def _attend(logits: Tensor, visible: Tensor, values: Tensor, softcap: float) -> Tensor:
    capped = softcap * torch.tanh(logits / softcap) if softcap else logits
    weights = torch.softmax(capped.masked_fill(~visible, -torch.inf), dim=-1)
    return weights @ values.transpose(0, 1)[:, None]


def _per_head(vectors: Tensor) -> Tensor:
    """Sum of squared norms over queries, (n_q_heads) float64."""
    return vectors.square().sum(dim=(2, 3), dtype=torch.float64).flatten()
