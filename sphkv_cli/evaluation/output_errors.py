"""Relative error of attention outputs, head by head, with everything before them dense.

    e = ||o^ - o|| / ||o||   per layer, query head and query after the context

o^ reads the coded context and the dense tokens after it, o all of it dense; queries are those of
one dense run, so that errors of earlier layers do not enter.  Source: ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sphkv_cli.evaluation.coding import DenseCoding, KeyValueCoding
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.masked_attention import CacheColumns, CodedRun, reading_coded
from sphkv_cli.evaluation.protocol import RetentionProtocol

_QUERIES = 64


@dataclass(frozen=True)
class OutputError:
    """Over layers, heads and queries: mean and 99th percentile of e."""

    mean: float
    p99: float


def output_errors(
    model: JudgedModel, codings: Sequence[KeyValueCoding], token_ids: Tensor, n_context: int
) -> list[OutputError]:
    """Errors of every coding of the first n_context tokens, for at most 64 later queries.

    Raises:
        SphkvError: the document is longer than the model's context.
    """
    n_tokens = int(token_ids.numel())
    model.require_length("the document", n_tokens)
    steps = min(n_tokens - n_context, _QUERIES)
    asked = torch.linspace(n_context, n_tokens - 1, steps).round().long()
    protocol = RetentionProtocol(n_context)
    dense = CodedRun(model.geometry, model.modules, DenseCoding(model.shape), protocol)
    run = _ComparingRun(model, dense, codings, protocol, asked, [[] for _ in codings])
    with reading_coded(model.model, run):
        model.dense_hidden(token_ids.to(model.model.device))
    dense.check_complete()
    found = [np.concatenate(errors) for errors in run.errors]
    return [OutputError(float(e.mean()), float(np.quantile(e, 0.99))) for e in found]


@dataclass
class _ComparingRun:
    """Dense attention; every coding's output beside it. errors: per coding, one array a layer."""

    model: JudgedModel
    dense: CodedRun
    codings: Sequence[KeyValueCoding]
    protocol: RetentionProtocol
    asked: Tensor
    errors: list[list[np.ndarray[Any, np.dtype[np.float64]]]]

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        layer = next(i for i, known in enumerate(self.model.modules) if known is module)
        described = self.model.geometry.layers[layer]
        output = self.dense.attend(module, query, key, value)
        asked = self.asked.to(query.device)
        # (1, n_tokens, n_q_heads, head_dim) -> (n_q_heads, n_asked, head_dim)
        exact = output[0, asked].transpose(0, 1).double()
        span = self.protocol.n_context
        positions = torch.arange(span, device=key.device)
        keys, values = (x[0, :, :span].transpose(0, 1).float() for x in (key, value))
        for coding, errors in zip(self.codings, self.errors, strict=True):
            coded = coding.code(layer, keys, values, positions)
            found = CacheColumns.of(key, value, coded, query.shape[1]).attend(
                query[0][:, asked],
                asked,
                self.protocol,
                window=described.window,
                scale=described.softmax_scale,
                softcap=described.logit_softcap,
            )
            away = (found.double() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-30)
            errors.append(away.flatten().cpu().numpy())
        return output
