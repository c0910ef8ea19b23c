"""One document under many codings: hidden states once dense, once per coding, then scores.

Under the retention protocol the context is prefilled once and only the tokens after it run again
(`context_reading.py`); under any other protocol every coding runs the whole document.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sphkv_cli.errors import SphkvError
from sphkv_cli.evaluation.coding import KeyValueCoding, ModelCacheShape
from sphkv_cli.evaluation.context_reading import ContextReader
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.protocol import ReadProtocol, RetentionProtocol
from sphkv_cli.evaluation.result import DocumentScore
from sphkv_cli.evaluation.retained_context import RetainedContext
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
        SphkvError: the document is longer than the model's context, has no position to score, or
            no token that is read coded.
    """
    progress = progress or NullProgress()
    model.require_length(f"document {document.name}", document.n_tokens)
    positions = protocol.scored(document.n_tokens)
    if len(positions) < 1:
        raise SphkvError(
            f"document {document.name} has {document.n_tokens} tokens, the first scored position "
            f"is {positions.start}",
            "capture longer documents, or lower --first-scored",
        )
    protocol.require_coded(document.name, document.n_tokens)
    ids = document.token_ids.to(model.model.device)
    dense = model.dense_hidden(ids)
    read, first = _reader(model, document, codings, protocol)
    hidden, n_dense_keys, seconds = [], [], []
    for coding in codings:
        started = time.perf_counter()
        states, n_dense = read(coding)
        hidden.append(states)
        n_dense_keys.append(n_dense)
        seconds.append(time.perf_counter() - started)
        progress.advance()
    shifted = range(positions.start - first, positions.stop - first)
    scores = score_tokens(
        model.head, dense[first:], hidden, ids[first:], shifted, chunk=logit_chunk
    )
    found = []
    for coding, n_dense, score, elapsed in zip(codings, n_dense_keys, scores, seconds, strict=True):
        if not np.isfinite(score.kl).all():
            raise SphkvError(
                f"{coding.name} makes the logits of {document.name} NaN or infinite",
                "run the model in float32 (--dtype float32)",
            )
        score = replace(score, positions=score.positions + first)
        row = _document_score(document, model.shape, coding, protocol, n_dense, score, elapsed)
        found.append((row, score))
    return found


_Read = Callable[[KeyValueCoding], tuple[torch.Tensor, int]]


def _reader(
    model: JudgedModel,
    document: JudgedDocument,
    codings: Sequence[KeyValueCoding],
    protocol: ReadProtocol,
) -> tuple[_Read, int]:
    """What gives the final hidden states of a coding, of the tokens from the returned one on, and
    the keys that it left dense."""
    if isinstance(protocol, RetentionProtocol):
        n_context = protocol.n_context
        context = RetainedContext.of(model, document.name, document.token_ids, n_context)
        return ContextReader.of(context, codings).read, n_context

    def whole(coding: KeyValueCoding) -> tuple[torch.Tensor, int]:
        hidden, run = model.coded_hidden(
            document.token_ids.to(model.model.device), coding, protocol
        )
        return hidden, run.n_dense_keys

    return whole, 0


def _document_score(
    document: JudgedDocument,
    shape: ModelCacheShape,
    coding: KeyValueCoding,
    protocol: ReadProtocol,
    n_dense_keys: int,
    scores: TokenScores,
    seconds: float,
) -> DocumentScore:
    n_coded = len(protocol.coded_positions(document.n_tokens))
    coded_bytes = coding.stored_bytes(n_coded) + coding.table_bytes()
    coded_bytes += dense_key_bytes(n_dense_keys, shape.head_dim, document.n_tokens)
    return score_of(
        document,
        shape,
        scores,
        n_coded=n_coded,
        coded_bytes=coded_bytes,
        code_rate=coding.code_rate(n_coded),
        dense_keys=n_dense_keys,
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
