"""One document under many codings: hidden states once dense, once per coding, then scores."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sphkv_cli.errors import SphkvError
from sphkv_cli.evaluation.coding import KeyValueCoding, ModelCacheShape
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.masked_attention import CodedRun
from sphkv_cli.evaluation.protocol import ReadProtocol
from sphkv_cli.evaluation.result import DocumentScore
from sphkv_cli.evaluation.sinks import dense_key_bytes
from sphkv_cli.evaluation.token_scores import TokenScores, score_tokens
from sphkv_cli.progress import NullProgress, Progress


@dataclass(frozen=True)
class JudgedDocument:
    """name and token_ids (n_tokens) int64."""

    name: str
    token_ids: torch.Tensor

    @property
    def n_tokens(self) -> int:
        """Length."""
        return int(self.token_ids.numel())


def judge_document(
    model: JudgedModel,
    document: JudgedDocument,
    codings: Sequence[KeyValueCoding],
    protocol: ReadProtocol,
    *,
    logit_chunk: int = 128,
    progress: Progress | None = None,
) -> list[tuple[DocumentScore, TokenScores]]:
    """Scores of every coding on one document, in order.

    The dense logits are made once for all codings; final hidden states of all are held meanwhile.

    Raises:
        SphkvError: the document is longer than the model's context or has no position to score.
    """
    progress = progress or NullProgress()
    model.require_length(document.name, document.n_tokens)
    positions = protocol.scored(document.n_tokens)
    if len(positions) < 1:
        raise SphkvError(
            f"document {document.name} has {document.n_tokens} tokens, the first scored position "
            f"is {positions.start}",
            "capture longer documents, or lower --first-scored",
        )
    ids = document.token_ids.to(model.model.device)
    dense = model.dense_hidden(ids)
    hidden, runs, seconds = [], [], []
    for coding in codings:
        started = time.perf_counter()
        states, run = model.coded_hidden(ids, coding, protocol)
        hidden.append(states)
        runs.append(run)
        seconds.append(time.perf_counter() - started)
        progress.advance()
    scores = score_tokens(model.head, dense, hidden, ids, positions, chunk=logit_chunk)
    found = []
    for coding, run, score, elapsed in zip(codings, runs, scores, seconds, strict=True):
        if not np.isfinite(score.kl).all():
            raise SphkvError(
                f"{coding.name} makes the logits of {document.name} NaN or infinite",
                "run the model in float32 (--dtype float32)",
            )
        found.append((_document_score(document, coding, protocol, run, score, elapsed), score))
    return found


def _document_score(
    document: JudgedDocument,
    coding: KeyValueCoding,
    protocol: ReadProtocol,
    run: CodedRun,
    scores: TokenScores,
    seconds: float,
) -> DocumentScore:
    n_coded = len(protocol.coded_positions(document.n_tokens))
    shape = ModelCacheShape(run.geometry.n_layers, run.geometry.n_kv_heads, run.geometry.head_dim)
    coded_bytes = coding.stored_bytes(n_coded) + coding.table_bytes()
    coded_bytes += dense_key_bytes(run.n_dense_keys, shape.head_dim, document.n_tokens)
    return score_of(
        document,
        shape,
        scores,
        n_coded=n_coded,
        coded_bytes=coded_bytes,
        code_rate=coding.code_rate(n_coded),
        dense_keys=run.n_dense_keys,
        seconds=seconds,
    )


def score_of(
    document: JudgedDocument,
    shape: ModelCacheShape,
    scores: TokenScores,
    *,
    n_coded: int,
    coded_bytes: int,
    code_rate: float,
    dense_keys: int,
    seconds: float,
) -> DocumentScore:
    """One run's row of a document; the arguments are fields of `DocumentScore`.

    n_coded: tokens that are not stored dense.
    """
    total = coded_bytes + shape.dense_bytes(document.n_tokens - n_coded)
    n_coordinates = shape.n_coordinates(document.n_tokens)
    return DocumentScore(
        name=document.name,
        n_tokens=document.n_tokens,
        n_scored=len(scores.kl),
        kl=float(scores.kl.mean()),
        kl_p99=float(np.quantile(scores.kl, 0.99)),
        perplexity_dense=math.exp(float(scores.nll_dense.mean())),
        perplexity_coded=math.exp(float(scores.nll_coded.mean())),
        top1=float(scores.agree.mean()),
        code_rate=code_rate,
        laid_out_rate=8.0 * total / n_coordinates,
        coded_bytes=coded_bytes,
        coded_laid_out_rate=8.0 * coded_bytes / max(shape.n_coordinates(n_coded), 1),
        dense_keys=dense_keys,
        dense_key_fraction=2 * shape.head_dim * dense_keys / n_coordinates,
        seconds=seconds,
    )
