"""A document decoded step by step from the drop-in cache, scored as its parallel twin is.

The context is one forward pass, each token after it one more, as in generation: slow, and what a
user runs.  Bytes of pages are those of the tensors that the cache holds.  Source: ours.
"""

import time
from pathlib import Path

import torch
from torch import Tensor

from sphkv_cli.allocation.layout import fixed_table_bytes
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.judging import JudgedDocument, score_of
from sphkv_cli.evaluation.protocol import RetentionProtocol
from sphkv_cli.evaluation.result import DocumentScore
from sphkv_cli.evaluation.token_scores import TokenScores, score_tokens

NAME = "policy, step by step"


def judge_stepwise(
    model: JudgedModel,
    document: JudgedDocument,
    n_context: int,
    allocation: Path,
    *,
    code_rate: float,
    logit_chunk: int = 128,
) -> tuple[DocumentScore, TokenScores]:
    """Scores of the policy's drop-in cache on one document, tokens after the context dense.

    code_rate: of the policy's codes, which the tensors do not tell from their padding.

    Raises:
        ArtifactError: the allocation is for another model.
        SphkvError: the model cannot use the cache, or memory runs out.
    """
    from sphkv_cli.generation.spherical_cache import SphericalCache

    ids = document.token_ids.to(model.model.device)
    dense = model.dense_hidden(ids)
    cache = SphericalCache.from_policy(allocation, model.model, window=None)
    started = time.perf_counter()
    hidden = _decode(model, ids, n_context, cache)
    elapsed = time.perf_counter() - started
    protocol = RetentionProtocol(n_context)
    positions = protocol.scored(document.n_tokens)
    (scores,) = score_tokens(model.head, dense, [hidden], ids, positions, chunk=logit_chunk)
    tail = sum(
        state.tail_keys.nbytes + state.tail_values.nbytes
        for state in cache.states()
        if state is not None
    )
    # In place of the frames' tensors, what the allocation says that their tables take.
    tables = fixed_table_bytes(cache.rule.frames, cache.rule.tiers)
    return score_of(
        document,
        model.shape,
        scores,
        n_coded=n_context,
        coded_bytes=cache.memory_bytes() - cache.frame_bytes - tail + tables,
        code_rate=code_rate,
        dense_keys=0,
        seconds=elapsed,
    ), scores


def _decode(model: JudgedModel, ids: Tensor, n_context: int, cache: object) -> Tensor:
    """Final hidden states (n_tokens, hidden_dim)."""
    body = model.model.get_decoder()
    parts = [ids[:n_context], *(ids[i : i + 1] for i in range(n_context, len(ids)))]
    with torch.inference_mode():
        rows = [
            body(input_ids=part[None], past_key_values=cache).last_hidden_state[0] for part in parts
        ]
    return torch.cat(rows)
