"""What codings of a cache do to captured vectors, logits and attention outputs, side by side.

    key D            mean over tokens of ||k - khat||^2 / ||k - mu||^2    mu: mean of the document
    value D          mean over tokens of ||v - vhat||^2 / ||v||^2
    logit error      rms over coded pairs of softmax_scale q.(khat - k), nats
    output error     sqrt(mean over layers and query heads of sum_i ||ohat_i - o_i||^2 / sum_i
                     ||o_i||^2), i over the captured queries

Queries read the cache as a `ReadProtocol` says.  mu (of a head, after RoPE) is the same for every
coding, so that codings with different means of their own can be compared.  Source: ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sphkv_cli.artifacts.capture import CaptureReader, DocumentInfo, LayerInfo
from sphkv_cli.errors import SphkvError
from sphkv_cli.evaluation.coding import CodedTokens, KeyValueCoding
from sphkv_cli.evaluation.masked_attention import CacheColumns
from sphkv_cli.evaluation.protocol import ReadProtocol
from sphkv_cli.fit.captured_vectors import read_vectors
from sphkv_cli.fit.layer_pool import each_layer
from sphkv_cli.progress import NullProgress, Progress

FloatArray = npt.NDArray[np.float64]
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class CodingErrors:
    """One coding over documents and layers; relative_output: (n_layers, n_q_heads) squared."""

    name: str
    key_distortion: float
    value_distortion: float
    logit_rms: float
    relative_output: FloatArray

    @property
    def output_error(self) -> float:
        """Root of the mean over layers and heads of the squared relative output error."""
        return float(np.sqrt(self.relative_output.mean()))

    @property
    def worst_head(self) -> float:
        """The largest relative output error of a query head."""
        return float(np.sqrt(self.relative_output.max()))


def coding_errors(
    capture: CaptureReader,
    documents: Sequence[DocumentInfo],
    layers: Sequence[int],
    codings: Sequence[KeyValueCoding],
    protocol: ReadProtocol,
    *,
    max_queries: int,
    progress: Progress | None = None,
) -> list[CodingErrors]:
    """Measure every coding on the same documents, layers and queries, in order.

    Args:
        max_queries: per document and layer, evenly spaced among the captured ones that the
            protocol scores.

    Raises:
        SphkvError: no captured query of any document is scored by the protocol, or NaN or Inf
            among the vectors.
    """
    progress = progress or NullProgress()
    queried = [(d, r) for d in documents if (r := _rows(capture, d, protocol, max_queries)).size]
    if not queried:
        raise SphkvError(
            "no captured query reads a coded token in these documents",
            "capture longer documents, or more queries (--query-tail)",
        )
    for coding in codings:
        protocol.check_group(coding.name, coding.token_group)

    def of_layer(index: int) -> list[_LayerSums]:
        return _layer_sums(capture, queried, layers[index], codings, protocol)

    sums = []
    for found in each_layer(of_layer, len(layers)):
        sums.append(found)
        progress.advance()
    return [
        _summary(coding.name, [layer[index] for layer in sums])
        for index, coding in enumerate(codings)
    ]


@dataclass
class _LayerSums:
    """error, output: (n_q_heads) sums of squares; others: sums and what they are divided by."""

    error: Tensor
    output: Tensor
    key: float = 0.0
    value: float = 0.0
    n_vectors: int = 0
    logit: float = 0.0
    n_logits: int = 0


def _rows(
    capture: CaptureReader, document: DocumentInfo, protocol: ReadProtocol, max_queries: int
) -> npt.NDArray[np.int64]:
    """Which captured queries of a document are used: rows of its query arrays, ascending."""
    positions = capture.query_positions(document)
    scored = protocol.scored(document.n_tokens)
    rows = np.flatnonzero((positions >= scored.start) & (positions < document.n_tokens))
    return rows[:: max(-(-rows.size // max_queries), 1)]


def _layer_sums(
    capture: CaptureReader,
    queried: Sequence[tuple[DocumentInfo, npt.NDArray[np.int64]]],
    layer: int,
    codings: Sequence[KeyValueCoding],
    protocol: ReadProtocol,
) -> list[_LayerSums]:
    zeros = torch.zeros(capture.n_q_heads, dtype=torch.float64)
    sums = [_LayerSums(zeros.clone(), zeros.clone()) for _ in codings]
    info = capture.layers[layer]
    for document, rows in queried:
        keys = read_vectors(capture, document, layer, "keys")
        values = read_vectors(capture, document, layer, "values")
        queries = read_vectors(capture, document, layer, "queries")[torch.from_numpy(rows)]
        at = torch.from_numpy(capture.query_positions(document)[rows])
        exact = _attend(info, keys, values, CodedTokens(keys, values), queries, at, protocol)
        mean = keys.mean(dim=0)
        for coding, total in zip(codings, sums, strict=True):
            span = protocol.coded_span(document.n_tokens, coding.token_group)
            coded = coding.code(layer, keys[:span], values[:span], torch.arange(span))
            found = _attend(info, keys, values, coded, queries, at, protocol)
            total.error += _energy(found - exact)
            total.output += _energy(exact)
            total.key += _relative(coded.keys - keys[:span], keys[:span] - mean)
            total.value += _relative(coded.values - values[:span], values[:span])
            total.n_vectors += keys[:span, :, 0].numel()
            error, n_logits = _logit_error(info, coded.keys - keys[:span], queries, at, protocol)
            total.logit += error
            total.n_logits += n_logits
    return sums


def _attend(
    info: LayerInfo,
    keys: Tensor,
    values: Tensor,
    coded: CodedTokens,
    queries: Tensor,
    at: Tensor,
    protocol: ReadProtocol,
) -> Tensor:
    """(n_q_heads, n_queries, head_dim)."""
    columns = CacheColumns.of(
        keys.transpose(0, 1)[None], values.transpose(0, 1)[None], coded, queries.shape[1]
    )
    return columns.attend(
        queries.transpose(0, 1),
        at,
        protocol,
        window=info.window,
        scale=info.softmax_scale,
        softcap=info.logit_softcap,
    )


def _logit_error(
    info: LayerInfo, errors: Tensor, queries: Tensor, at: Tensor, protocol: ReadProtocol
) -> tuple[float, int]:
    """Sum of (softmax_scale q.e)^2 over pairs read coded and seen, and their number."""
    tokens = torch.arange(errors.shape[0])
    distance = at[:, None] - tokens[None, :]
    reads = protocol.reads_coded(at, tokens) & (distance >= 0)
    if info.window:
        reads &= distance < info.window
    n_kv_heads = errors.shape[1]
    shape = (queries.shape[0], n_kv_heads, -1, queries.shape[-1])
    grouped = queries.reshape(shape).permute(1, 2, 0, 3)
    dots = info.softmax_scale * (grouped @ errors.permute(1, 2, 0)[:, None])
    total = dots.mul_(reads).square().sum(dtype=torch.float64)
    return float(total), int(reads.sum()) * queries.shape[1]


def _energy(vectors: Tensor) -> Tensor:
    return vectors.square().sum(dim=(1, 2), dtype=torch.float64)


def _relative(errors: Tensor, vectors: Tensor) -> float:
    """Sum over vectors of ||e||^2 / ||x||^2."""
    ratio = errors.square().sum(dim=-1) / vectors.square().sum(dim=-1).clamp_min(_TINY)
    return float(ratio.sum(dtype=torch.float64))


def _summary(name: str, layers: Sequence[_LayerSums]) -> CodingErrors:
    n_vectors = sum(layer.n_vectors for layer in layers)
    n_logits = sum(layer.n_logits for layer in layers)
    relative = [layer.error / layer.output.clamp_min(_TINY) for layer in layers]
    return CodingErrors(
        name=name,
        key_distortion=sum(layer.key for layer in layers) / n_vectors,
        value_distortion=sum(layer.value for layer in layers) / n_vectors,
        logit_rms=(sum(layer.logit for layer in layers) / max(n_logits, 1)) ** 0.5,
        relative_output=torch.stack(relative).numpy(),
    )
