"""The error that coding makes at the output of attention: what codes are ranked by.

    o_i = sum_j softmax_j(l_ij) v_j,    o^_i = sum_j softmax_j(l^_ij) v^_j,
    relative output error of a query head    sqrt(sum_i ||o^_i - o_i||^2 / sum_i ||o_i||^2)

in the uniform protocol: query i reads token j coded iff it lies more than `window` tokens back, is
none of the first tokens and, for its key, is no sink (a key whose norm is below a threshold of its
head stays dense; its value is coded). The mean over layers and heads of the square predicts the KL
of the model's next token better than logit or vector errors do; a head with an error of 1 or more
has lost its output, whatever the mean says. Ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sphkv_cli.artifacts.capture import CaptureReader, DocumentInfo
from sphkv_cli.artifacts.capture_info import LayerInfo
from sphkv_cli.errors import SphkvError
from sphkv_cli.evaluation.protocol import UniformProtocol
from sphkv_cli.fit.captured_vectors import documents_of, read_vectors
from sphkv_cli.fit.layer_pool import each_layer
from sphkv_cli.progress import Progress
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.spherical_code import SphericalCode

FloatArray = npt.NDArray[np.float64]

CodePair = tuple[SphericalCode | None, SphericalCode | None]
"""Code of the keys and of the values; None leaves them dense."""

MAX_DOCUMENTS = 8
MAX_TOKENS = 8192
"""Of a document: its keys of a layer are in memory at once."""
QUERIES_PER_LAYER = 512
"""Spread evenly over the documents and their positions."""


@dataclass(frozen=True, eq=False)
class AttentionErrors:
    """Sums over the queries of all documents.

    error: (n_pairs, n_layers, n_q_heads) of ||o^ - o||^2; output: (n_layers, n_q_heads) of ||o||^2;
    logit_error: (n_pairs, n_layers, n_q_heads), of (l^ - l)^2 over the n_logits (n_layers,) coded
    and visible pairs of a query head; dense_share: of the keys, kept dense as sinks.
    """

    error: FloatArray
    output: FloatArray
    logit_error: FloatArray
    n_logits: FloatArray
    dense_share: float

    @property
    def relative(self) -> FloatArray:
        """Squared relative output error, (n_pairs, n_layers, n_q_heads)."""
        return np.asarray(self.error / np.maximum(self.output, np.finfo(np.float64).tiny))

    @property
    def mean_squared(self) -> FloatArray:
        """Mean over layers and heads of the squared relative output error, (n_pairs,)."""
        return np.asarray(self.relative.mean(axis=(1, 2)))

    def worst_head(self, index: int) -> tuple[float, int, int]:
        """Relative output error, layer and query head of the worst head of one pair."""
        squared = self.relative[index]
        layer, head = np.unravel_index(int(squared.argmax()), squared.shape)
        return float(np.sqrt(squared[layer, head])), int(layer), int(head)

    def logit_rms(self, index: int) -> float:
        """Rms error of a scaled logit over all coded pairs of one pair of codes, nats."""
        n_logits = float(self.n_logits.sum()) * self.error.shape[2]
        return float(np.sqrt(self.logit_error[index].sum() / max(n_logits, 1.0)))


def attention_errors(
    capture: CaptureReader,
    frames: FrameSet,
    pairs: Sequence[CodePair],
    protocol: UniformProtocol,
    sink_norms: FloatArray | None,
    progress: Progress,
    title: str = "Measuring attention",
) -> AttentionErrors:
    """Measure every pair of codes on the `select` documents, a layer at a time.

    Args:
        sink_norms: (n_layers, n_kv_heads), the norm below which a key stays dense; None for none.

    Raises:
        SphkvError: there is no `select` document, or all are too short to read anything coded.
    """
    documents = documents_of(capture, "select")
    step = -(-len(documents) // MAX_DOCUMENTS)
    documents = documents[::step]
    n_queries = max(QUERIES_PER_LAYER // len(documents), 1)
    progress.start(title, capture.n_layers, "layers")

    def layer_errors(layer: int) -> _LayerSums:
        sums = _LayerSums.zeros(len(pairs), capture.n_q_heads)
        norms = None if sink_norms is None else torch.from_numpy(sink_norms[layer])
        for document in documents:
            attended = _Attended.read(capture, document, layer, n_queries, protocol, norms)
            if attended is not None:
                sums.add(attended, frames, layer, pairs)
        return sums

    found = []
    for sums in each_layer(layer_errors, capture.n_layers):
        found.append(sums)
        progress.advance()
    progress.finish()
    if not any(sums.n_logits for sums in found):
        raise SphkvError(
            f"no `select` document of {capture.path} has a query that reads a coded token",
            f"capture documents of more than {protocol.first_scored} tokens",
        )
    return AttentionErrors(
        error=torch.stack([sums.error for sums in found], dim=1).numpy(),
        output=torch.stack([sums.output for sums in found]).numpy(),
        logit_error=torch.stack([sums.logit_error for sums in found], dim=1).numpy(),
        n_logits=np.array([float(sums.n_logits) for sums in found]),
        dense_share=float(np.mean([sums.n_dense / sums.n_keys for sums in found])),
    )


@dataclass(frozen=True, eq=False)
class _Attended:
    """One document in one layer, attended densely.

    queries: (n_kv_heads, group_size, n_queries, head_dim); keys, values: (n_tokens, n_kv_heads,
    head_dim); logits: (n_kv_heads, group_size, n_queries, n_tokens), scaled, neither capped nor
    masked; visible, coded: (n_queries, n_tokens) bool; dense_keys: (n_kv_heads, n_tokens) bool.
    """

    info: LayerInfo
    positions: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    logits: Tensor
    visible: Tensor
    coded: Tensor
    dense_keys: Tensor

    @staticmethod
    def read(
        capture: CaptureReader,
        document: DocumentInfo,
        layer: int,
        n_queries: int,
        protocol: UniformProtocol,
        norms: Tensor | None,
    ) -> "_Attended | None":
        """None where the document is too short for any query to read a coded token."""
        query_positions = torch.from_numpy(np.ascontiguousarray(capture.query_positions(document)))
        n_tokens = min(document.n_tokens, MAX_TOKENS)
        usable = torch.nonzero(
            (query_positions >= protocol.first_scored) & (query_positions < n_tokens)
        )[:, 0]
        if usable.numel() == 0:
            return None
        chosen = usable[:: max(usable.numel() // n_queries, 1)]
        rows = query_positions[chosen]
        keys = read_vectors(capture, document, layer, "keys", slice(0, n_tokens))
        values = read_vectors(capture, document, layer, "values", slice(0, n_tokens))
        queries = read_vectors(capture, document, layer, "queries")[chosen]
        info = capture.layers[layer]
        grouped = queries.reshape(len(chosen), keys.shape[1], -1, keys.shape[2]).permute(1, 2, 0, 3)
        tokens = torch.arange(n_tokens)
        distance = rows[:, None] - tokens[None, :]
        visible = distance >= 0
        if info.window:
            visible &= distance < info.window
        dense_keys = torch.zeros(keys.shape[1], n_tokens, dtype=torch.bool)
        if norms is not None:
            dense_keys = (keys.norm(dim=-1) < norms).T.contiguous()
        return _Attended(
            info=info,
            positions=tokens,
            queries=grouped,
            keys=keys,
            values=values,
            logits=_logits(grouped, keys, info.softmax_scale),
            visible=visible,
            coded=protocol.reads_coded(rows, tokens) & visible,
            dense_keys=dense_keys,
        )

    def weights(self, logits: Tensor) -> Tensor:
        """Softmax of logits, capped and masked."""
        cap = self.info.logit_softcap
        capped = cap * torch.tanh(logits / cap) if cap else logits
        return torch.softmax(capped.masked_fill(~self.visible, -torch.inf), dim=-1)


@dataclass
class _LayerSums:
    """Sums of one layer: error, logit_error (n_pairs, n_q_heads), output (n_q_heads)."""

    error: Tensor
    output: Tensor
    logit_error: Tensor
    n_logits: int = 0
    n_dense: int = 0
    n_keys: int = 0

    @staticmethod
    def zeros(n_pairs: int, n_q_heads: int) -> "_LayerSums":
        return _LayerSums(
            torch.zeros(n_pairs, n_q_heads, dtype=torch.float64),
            torch.zeros(n_q_heads, dtype=torch.float64),
            torch.zeros(n_pairs, n_q_heads, dtype=torch.float64),
        )

    def add(
        self, attended: _Attended, frames: FrameSet, layer: int, pairs: Sequence[CodePair]
    ) -> None:
        """Attend through every pair; keys and values are coded once per distinct code."""
        values = attended.values.transpose(0, 1)[:, None]  # (n_kv_heads, 1, n_tokens, head_dim)
        dense = attended.weights(attended.logits)
        exact = dense @ values
        self.output += _per_query_head(exact)
        self.n_logits += int(attended.coded.sum())
        self.n_dense += int(attended.dense_keys.sum())
        self.n_keys += attended.dense_keys.numel()
        value_errors = _value_errors(attended, frames, {v for _, v in pairs if v is not None})
        by_key: dict[SphericalCode | None, list[int]] = {}
        for index, (key_code, _) in enumerate(pairs):
            by_key.setdefault(key_code, []).append(index)
        for key_code, indices in by_key.items():
            weights, logit_error = dense, torch.zeros_like(self.output)
            if key_code is not None:
                change = _logit_change(attended, frames, layer, key_code)
                logit_error = change.square().sum(dim=(2, 3), dtype=torch.float64).flatten()
                weights = attended.weights(attended.logits + change)
            moved = weights @ values - exact
            coded_weights = weights * attended.coded
            for index in indices:
                value_code = pairs[index][1]
                error = moved
                if value_code is not None:
                    error = moved + coded_weights @ value_errors[value_code]
                self.error[index] += _per_query_head(error)
                self.logit_error[index] += logit_error


def _logit_change(attended: _Attended, frames: FrameSet, layer: int, code: SphericalCode) -> Tensor:
    """l^ - l where the key is read coded, else 0."""
    framed = frames.keys_to_frame(layer, attended.keys, attended.positions)
    coded = code.decode(code.encode(framed)).to(framed.dtype)
    keys = frames.keys_from_frame(layer, coded, attended.positions)
    change = _logits(attended.queries, keys - attended.keys, attended.info.softmax_scale)
    reads_coded = attended.coded & ~attended.dense_keys[:, None, None, :]
    return change * reads_coded


def _value_errors(
    attended: _Attended, frames: FrameSet, codes: set[SphericalCode]
) -> Mapping[SphericalCode, Tensor]:
    """v^ - v per code, (n_kv_heads, 1, n_tokens, head_dim)."""
    framed = frames.values_to_frame(attended.values)
    return {
        code: (frames.output_from_frame(code.decode(code.encode(framed))) - attended.values)
        .transpose(0, 1)[:, None]
        .to(attended.values.dtype)
        for code in codes
    }


def _logits(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """queries (n_kv_heads, group_size, n_queries, head_dim), keys (n_tokens, n_kv_heads, .)."""
    return scale * (queries @ keys.permute(1, 2, 0)[:, None])


def _per_query_head(vectors: Tensor) -> Tensor:
    """Sum of squared norms over queries, (n_q_heads,) float64."""
    return vectors.square().sum(dim=(2, 3), dtype=torch.float64).flatten()
