"""What an allocation must know of a text, from one dense run of the model over it.

The run's own queries, keys and values are measured layer by layer as they pass: no capture of the
text is needed, and its length is free.  The queries are those of the window, one in four before it
(at most 512, so that work grows with the length and not its square) and all of the horizon, at most
512: a ceiling that saw a sample of them would drop what the others ask for.  Source: ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sphkv_cli.allocation.attention_utility import LayerGeometry
from sphkv_cli.allocation.context import LayerContext, Split
from sphkv_cli.allocation.estimators import UtilityEstimator
from sphkv_cli.allocation.frozen import FrozenAllocation
from sphkv_cli.allocation.measure import MeasuredDocument, Measurement
from sphkv_cli.allocation.published import snapkv_scores
from sphkv_cli.artifacts.capture_info import DocumentInfo
from sphkv_cli.evaluation.coding import DenseCoding
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.masked_attention import CodedRun, reading_coded
from sphkv_cli.evaluation.protocol import RetentionProtocol

Float = NDArray[np.float64]

_QUERY_STRIDE = 4
_QUERIES_BEFORE = _QUERIES_AFTER = 512


@dataclass(frozen=True)
class MeasuredContext:
    """document: with the allocation's own scores and the true horizon (for ceilings alone).

    other_scores: by estimator; snapkv: scores as published; (n_layers, n_kv_heads, n_context).
    """

    document: MeasuredDocument
    other_scores: Mapping[str, Float]
    snapkv: Float

    def scored_by(self, name: str) -> MeasuredDocument:
        """The document in the order of another estimator."""
        return replace(self.document, scores=self.other_scores[name])


def horizon_positions(n_context: int, n_tokens: int) -> Tensor:
    """(n) int64: the queries after the context that the oracle sees, all or evenly spaced."""
    steps = min(n_tokens - n_context, _QUERIES_AFTER)
    return torch.linspace(n_context, n_tokens - 1, steps, dtype=torch.float64).round().long()


def measure_context(
    model: JudgedModel,
    allocation: FrozenAllocation,
    name: str,
    token_ids: Tensor,
    n_context: int,
    others: Mapping[str, UtilityEstimator] | None = None,
) -> MeasuredContext:
    """Measure the first n_context of (n_tokens) tokens; those after them are the horizon.

    Args:
        others: further estimators whose scores are wanted.

    Raises:
        SphkvError: longer than the model's context, or a vector that a tier cannot encode.
        ValueError: no horizon.
    """
    n_tokens = int(token_ids.numel())
    if not 0 < n_context < n_tokens:
        raise ValueError(f"a context of {n_context} of {n_tokens} tokens")
    model.require_length(f"document {name}", n_tokens)
    run = _MeasuringRun.of(model, allocation, others or {}, n_tokens, n_context)
    with reading_coded(model.model, run):
        model.dense_hidden(token_ids.to(model.model.device))
    run.dense.check_complete()
    info = DocumentInfo(0, name, "judge", n_tokens, run.asked.numel(), name, 0, "")
    document = run.found.document(info, run.split)
    return MeasuredContext(document, run.other_scores, run.snapkv)


@dataclass
class _MeasuringRun:
    """Dense attention that measures each layer as it goes; asked: positions of the queries."""

    model: JudgedModel
    allocation: FrozenAllocation
    others: Mapping[str, UtilityEstimator]
    dense: CodedRun
    asked: Tensor
    split: Split
    found: Measurement
    snapkv: Float
    other_scores: dict[str, Float] = field(default_factory=dict)

    @staticmethod
    def of(
        model: JudgedModel,
        allocation: FrozenAllocation,
        others: Mapping[str, UtilityEstimator],
        n_tokens: int,
        n_context: int,
    ) -> "_MeasuringRun":
        start = max(n_context - allocation.window, 0)
        before = torch.arange(0, start, max(_QUERY_STRIDE, -(-start // _QUERIES_BEFORE)))
        window = torch.arange(start, n_context)
        horizon = horizon_positions(n_context, n_tokens)
        first, last = before.numel(), before.numel() + window.numel()
        shape = (model.geometry.n_layers, model.geometry.n_kv_heads, n_context)
        protocol = RetentionProtocol(n_context)
        return _MeasuringRun(
            model,
            allocation,
            others,
            CodedRun(model.geometry, model.modules, DenseCoding(model.shape), protocol),
            torch.cat([before, window, horizon]),
            Split(n_context, slice(first, last), slice(last, last + horizon.numel())),
            Measurement(shape, allocation.formats, with_horizon=True),
            np.empty(shape),
            {name: np.empty(shape) for name in others},
        )

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        layer = next(i for i, known in enumerate(self.model.modules) if known is module)
        info, frames = self.allocation.layers[layer], self.allocation.frames
        # The estimators' own tensors lie on the CPU.
        keys, values = (x[0].transpose(0, 1).float().cpu() for x in (key, value))
        queries = query[0].transpose(0, 1)[self.asked.to(query.device)].float().cpu()
        context = LayerContext(
            layer=layer,
            split=self.split,
            geometry=LayerGeometry(info.softmax_scale, info.window, info.logit_softcap),
            head_weights=self.allocation.head_weights[layer],
            positions=self.asked,
            queries=queries,
            keys=keys,
            values=values,
            queries_framed=frames.queries_to_frame(layer, queries),
            keys_framed=frames.keys_to_frame(layer, keys, torch.arange(keys.shape[0])),
            values_framed=frames.values_to_frame(values),
        )
        self.found.add(context, self.allocation.estimator)
        self.snapkv[layer] = snapkv_scores(context).numpy()
        for name, estimator in self.others.items():
            self.other_scores[name][layer] = estimator.score(context).numpy()
        return self.dense.attend(module, query, key, value)
