"""Every candidate on every judged document, layer and KV head: sums, then one row per setting.

    D                 mean over tokens of ||k - khat||^2 / ||k||^2
    centred D         the same over ||k - c_t||^2: what is left to code once c_t is known
    value D           mean of ||v - vhat||^2 / ||v||^2
    logit error       rms and 99th percentile of softmax_scale |q.khat - q.k| over coded pairs
    attention KL      mean over queries of KL(exact, coded), nats, values apart
    output error      sqrt of the mean over layers and query heads of
                      sum ||ohat - o||^2 / sum ||o||^2; keys coded alone, and keys with values

D is NaN for methods that give no vector back.  Source: ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sphkv_cli.artifacts.capture import CaptureReader, DocumentInfo
from sphkv_cli.comparison.candidates import Candidate, KmeansSetting
from sphkv_cli.comparison.judged_head import JudgedHead, judged_heads
from sphkv_cli.errors import SphkvError
from sphkv_cli.evaluation.protocol import ReadProtocol
from sphkv_cli.fit.captured_vectors import token_chunks
from sphkv_cli.fit.layer_pool import each_layer
from sphkv_cli.profile.error_sums import MagnitudeSums
from sphkv_cli.progress import Progress
from sphkv_codebooks.comparators.interface import Comparator, VectorQuantizer
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.frame import FrameSet

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Measured:
    """layers: sums per layer and candidate; logits: logit errors per candidate, all layers."""

    layers: list[list["CandidateSums"]]
    logits: list[MagnitudeSums]


@dataclass
class CandidateSums:
    """One candidate in one layer: sums over documents; squared output errors per query head.

    logit: of this layer until `measure` pools the layers, whose histograms are large.
    """

    n_q_heads: int
    distortion: float = 0.0
    centred_distortion: float = 0.0
    value_distortion: float = 0.0
    n_vectors: int = 0
    kl: float = 0.0
    n_queries: int = 0
    logit: MagnitudeSums | None = field(default_factory=lambda: MagnitudeSums(1))
    key_output: Tensor = field(init=False)
    whole_output: Tensor = field(init=False)
    exact_output: Tensor = field(init=False)

    def __post_init__(self) -> None:
        zeros = torch.zeros(self.n_q_heads, dtype=torch.float64)
        self.key_output, self.whole_output = zeros.clone(), zeros.clone()
        self.exact_output = zeros.clone()


def measure(
    capture: CaptureReader,
    documents: Sequence[DocumentInfo],
    fit_documents: Sequence[DocumentInfo],
    layers: Sequence[int],
    candidates: Sequence[Candidate],
    frame: FrameSet,
    protocol: ReadProtocol,
    max_queries: int,
    progress: Progress,
) -> Measured:
    """Sums per layer and candidate.

    Args:
        frame: without rotation; centred candidates see it.

    Raises:
        SphkvError: NaN or Inf in the capture, a method that cannot code a vector, or no captured
            query that reads a coded token.
    """

    def of_layer(index: int) -> list[CandidateSums]:
        return _layer(
            *(capture, documents, fit_documents, layers[index], candidates, frame, protocol),
            max_queries,
        )

    found = []
    logits = [MagnitudeSums(1) for _ in candidates]
    for sums in each_layer(of_layer, len(layers)):
        for pooled, total in zip(logits, sums, strict=True):
            _pool(pooled, total)
        found.append(sums)
        progress.advance()
    if all(total.n_queries == 0 for sums in found for total in sums):
        raise SphkvError(
            "no captured query reads a coded token in the judge documents",
            "capture longer documents, or more queries (--query-tail)",
        )
    return Measured(found, logits)


def _pool(pooled: MagnitudeSums, total: CandidateSums) -> None:
    """Move the logit errors of one layer into those of all."""
    part = total.logit
    assert part is not None
    pooled.count += part.count
    pooled.sum_sq += part.sum_sq
    pooled.largest = torch.maximum(pooled.largest, part.largest)
    pooled.histogram += part.histogram
    total.logit = None


def _layer(
    capture: CaptureReader,
    documents: Sequence[DocumentInfo],
    fit_documents: Sequence[DocumentInfo],
    layer: int,
    candidates: Sequence[Candidate],
    frame: FrameSet,
    protocol: ReadProtocol,
    max_queries: int,
) -> list[CandidateSums]:
    sums = [CandidateSums(capture.n_q_heads) for _ in candidates]
    methods = _fitted(capture, fit_documents, layer, candidates, frame)
    for document in documents:
        heads = judged_heads(capture, document, layer, frame, protocol, max_queries)
        for head, judged in enumerate(heads):
            first = head * capture.group_size
            query_heads = slice(first, first + capture.group_size)
            values: dict[int, Tensor] = {}
            for candidate, method, total in zip(candidates, methods[head], sums, strict=True):
                try:
                    _add(total, candidate, method, judged, values, query_heads)
                except CodeError as error:
                    raise SphkvError(
                        f"{candidate.setting} cannot code layer {layer}, KV head {head}: {error}",
                        "leave its method out with --method",
                    ) from error
    return sums


def _fitted(
    capture: CaptureReader,
    fit_documents: Sequence[DocumentInfo],
    layer: int,
    candidates: Sequence[Candidate],
    frame: FrameSet,
) -> list[list[Comparator]]:
    """The methods per KV head and candidate; k-means directions are fitted here."""
    needs_keys = any(isinstance(candidate.keys, KmeansSetting) for candidate in candidates)
    raw: Tensor | None = None
    centred: Tensor | None = None
    if needs_keys:
        chunks = [
            (keys, frame.keys_to_frame(layer, keys, positions))
            for document in fit_documents
            for keys, positions in token_chunks(capture, document, layer, "keys")
        ]
        raw, centred = (torch.cat(part) for part in zip(*chunks, strict=True))
    found = []
    for head in range(capture.n_kv_heads):
        row: list[Comparator] = []
        for candidate in candidates:
            method = candidate.keys
            if isinstance(method, KmeansSetting):
                assert raw is not None and centred is not None
                keys = (centred if candidate.is_centred else raw)[:, head].contiguous()
                try:
                    method = method.fit(keys, candidate.seed)
                except CodeError as error:
                    raise SphkvError(
                        f"{candidate.setting} cannot be fitted: {error}",
                        "capture more `fit` tokens, or leave kmeans out with --method",
                    ) from error
            row.append(method)
        found.append(row)
    return found


def _add(
    total: CandidateSums,
    candidate: Candidate,
    method: Comparator,
    judged: JudgedHead,
    coded_values: dict[int, Tensor],
    query_heads: slice,
) -> None:
    keys = judged.framed_keys if candidate.is_centred else judged.keys
    queries = judged.framed_queries if candidate.is_centred else judged.queries
    n_tokens = keys.shape[0]
    if isinstance(method, VectorQuantizer):
        errors = method.reconstruct(keys) - keys
        moved = queries @ errors.T
        error2 = errors.square().sum(-1)
        total.distortion += _ratio(error2, judged.keys)
        total.centred_distortion += _ratio(error2, judged.framed_keys)
    else:
        moved = method.logits(queries, keys.expand(queries.shape[0], -1, -1)) - queries @ keys.T
        total.distortion = total.centred_distortion = float("nan")
    total.n_vectors += n_tokens
    values = None
    if candidate.values is None:
        total.value_distortion = float("nan")
    else:
        # The same quantiser serves the row that is centred and the one that is not.
        key = id(candidate.values)
        if key not in coded_values:
            coded_values[key] = candidate.values.reconstruct(judged.values)
        values = coded_values[key]
        error2 = (values - judged.values).square().sum(-1)
        total.value_distortion += _ratio(error2, judged.values)
    assert total.logit is not None
    total.logit.add(0, (moved * judged.softmax_scale)[:, judged.coded])
    kl, with_keys, with_both = judged.attention(judged.products + moved * judged.coded, values)
    total.kl += float(kl.sum(dtype=torch.float64))
    total.n_queries += kl.numel()
    for sums, output in (
        (total.key_output, with_keys - judged.output),
        (total.whole_output, with_both - judged.output),
        (total.exact_output, judged.output),
    ):
        sums[query_heads] += output.square().sum(dim=(1, 2), dtype=torch.float64)


def _ratio(error2: Tensor, vectors: Tensor) -> float:
    """Sum over vectors of ||e||^2 / ||x||^2."""
    energy = vectors.square().sum(-1).clamp_min(_TINY)
    return float((error2 / energy).sum(dtype=torch.float64))
