"""A context that is prefilled once and read through many caches.

Under the retention protocol nothing of the context reads the code: its keys, values and hidden
states are those of the dense run whatever the cache, and only the tokens after it run again, over
[coded context | their own dense past] in one softmax.  So one dense run serves all codings, and
every token is encoded once per tier, layer by layer as they are first read.  Source: ours; equal to
`JudgedModel.coded_hidden` under `RetentionProtocol` to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sphkv_cli.allocation.coding import TierFormats
from sphkv_cli.evaluation.coding import CodedTokens, DenseCoding
from sphkv_cli.evaluation.frame_coding import through
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.masked_attention import CacheColumns, CodedRun, reading_coded
from sphkv_cli.evaluation.protocol import RetentionProtocol
from sphkv_codebooks.frame import FrameSet
from sphkv_kernels.tier import DROPPED, TierFormat

Tiers = npt.NDArray[np.int8]

_ERROR_QUERIES = 64


@dataclass(frozen=True)
class OutputError:
    """e = ||o^ - o|| / ||o|| over layers, query heads and queries: mean and 99th percentile.

    o^ reads the coded context and the dense tokens after it, o all of it dense; queries are those
    of the dense run, at most 64, so that errors of earlier layers do not enter.
    """

    mean: float
    p99: float


@dataclass(frozen=True, eq=False)
class RetainedContext:
    """What the dense run over a document left behind.

    token_ids (n_tokens), the first n_context of them the context; hidden: (n_tokens - n_context,
    hidden_dim) final states of the tokens after it; asked: positions whose output error counts.
    """

    model: JudgedModel
    token_ids: Tensor
    n_context: int
    hidden: Tensor
    asked: Tensor
    layers: tuple["_DenseLayer", ...]

    @staticmethod
    def of(model: JudgedModel, name: str, token_ids: Tensor, n_context: int) -> "RetainedContext":
        """Run the model densely over (n_tokens) tokens.

        Raises:
            SphkvError: longer than the model's context, or of an architecture that is not
                supported.
            ValueError: no token after the context.
        """
        n_tokens = int(token_ids.numel())
        if not 0 < n_context < n_tokens:
            raise ValueError(f"a context of {n_context} of {n_tokens} tokens")
        model.require_length(f"document {name}", n_tokens)
        steps = min(n_tokens - n_context, _ERROR_QUERIES)
        asked = torch.linspace(n_context, n_tokens - 1, steps).round().long()
        protocol = RetentionProtocol(n_context)
        dense = CodedRun(model.geometry, model.modules, DenseCoding(model.shape), protocol)
        run = _DenseRun(model, dense, n_context, asked.to(model.model.device))
        with reading_coded(model.model, run):
            hidden = model.dense_hidden(token_ids.to(model.model.device))
        dense.check_complete()
        layers = tuple(run.layers[layer] for layer in range(model.geometry.n_layers))
        return RetainedContext(model, token_ids, n_context, hidden[n_context:], run.asked, layers)

    @property
    def following(self) -> Tensor:
        """(n_tokens - n_context) token ids after the context."""
        return self.token_ids[self.n_context :]

    def read(self, tiers: "ContextTiers", tier_of_token: Tiers) -> Tensor:
        """Final hidden states of the tokens after the context, which read a plan of it.

        Args:
            tier_of_token: (n_layers, n_kv_heads, n_context) index into the tiers, -1 = dropped.
        """
        run = _ReadingRun(self, tiers, tier_of_token)
        with reading_coded(self.model.model, run):
            ids = self.following.to(self.model.model.device)
            return self.model.continued_hidden(ids, self.n_context)

    def output_error(self, tiers: "ContextTiers", tier_of_token: Tiers) -> OutputError:
        """Of the positions `asked`."""
        errors = []
        for layer, dense in enumerate(self.layers):
            coded = tiers.tokens(layer, tier_of_token[layer])
            found = self._attended(
                layer, dense.queries, self.asked, dense.near_keys, dense.near_values, coded
            )
            away = (found.double() - dense.outputs).norm(dim=-1)
            errors.append((away / dense.outputs.norm(dim=-1).clamp(min=1e-30)).flatten())
        found_errors = torch.cat(errors).cpu().numpy()
        return OutputError(float(found_errors.mean()), float(np.quantile(found_errors, 0.99)))

    def _attended(
        self,
        layer: int,
        query: Tensor,
        positions: Tensor,
        near_keys: Tensor,
        near_values: Tensor,
        coded: CodedTokens,
    ) -> Tensor:
        """(n_q_heads, n_queries, head_dim): queries (n_q_heads, n_queries, head_dim) after the
        context over the coded context and what came after it."""
        dense, described = self.layers[layer], self.model.geometry.layers[layer]
        columns = CacheColumns.of(
            torch.cat([dense.keys, near_keys], dim=2),
            torch.cat([dense.values, near_values], dim=2),
            coded,
            query.shape[0],
        )
        return columns.attend(
            query,
            positions,
            RetentionProtocol(self.n_context),
            window=described.window,
            scale=described.softmax_scale,
            softcap=described.logit_softcap,
        )


@dataclass(frozen=True, eq=False)
class _DenseLayer:
    """keys, values: (1, n_kv_heads, n_context, head_dim); near_keys, near_values: of the tokens
    after the context; queries, outputs (float64): (n_q_heads, n_asked, head_dim)."""

    keys: Tensor
    values: Tensor
    near_keys: Tensor
    near_values: Tensor
    queries: Tensor
    outputs: Tensor


@dataclass
class _DenseRun:
    """Dense attention that keeps what later readings need."""

    model: JudgedModel
    dense: CodedRun
    n_context: int
    asked: Tensor
    layers: dict[int, _DenseLayer] = field(default_factory=dict)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = self.dense.attend(module, query, key, value)
        n = self.n_context
        self.layers[_layer_of(self.model, module)] = _DenseLayer(
            keys=key[:, :, :n].clone(),
            values=value[:, :, :n].clone(),
            near_keys=key[:, :, n:].clone(),
            near_values=value[:, :, n:].clone(),
            queries=query[0][:, self.asked].clone(),
            outputs=output[0, self.asked].transpose(0, 1).double(),
        )
        return output


@dataclass(frozen=True, eq=False)
class _ReadingRun:
    """Attention of the tokens after the context over a plan of it and over themselves."""

    context: RetainedContext
    tiers: "ContextTiers"
    tier_of_token: Tiers

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        layer = _layer_of(self.context.model, module)
        coded = self.tiers.tokens(layer, self.tier_of_token[layer])
        start, n_after = self.context.n_context, query.shape[2]
        positions = torch.arange(start, start + n_after, device=query.device)
        found = self.context._attended(layer, query[0], positions, key, value, coded)
        return found.transpose(0, 1)[None].contiguous()


def _layer_of(model: JudgedModel, module: Any) -> int:
    return next(i for i, known in enumerate(model.modules) if known is module)


@dataclass(frozen=True, eq=False)
class ContextTiers:
    """Every token of a context in every tier, as queries read it.

    Memory: for each distinct code of keys and of values one context in float32.
    """

    tiers: Sequence[TierFormat]
    frames: FrameSet
    context: RetainedContext
    _coded: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)

    def tokens(self, layer: int, tier_of_token: Tiers) -> CodedTokens:
        """One layer of a plan; tier_of_token: (n_kv_heads, n_context), -1 = dropped."""
        if layer not in self._coded:
            self._coded[layer] = self._every_tier(layer)
        keys, values = self._coded[layer]
        formats = TierFormats.of(self.tiers)
        tier = torch.from_numpy(tier_of_token.T.astype(np.int64)).to(keys.device)
        kept = tier != DROPPED
        gone = ~kept[..., None]
        token = torch.arange(tier.shape[0], device=keys.device)[:, None]
        head = torch.arange(tier.shape[1], device=keys.device)[None, :]
        of_key, of_value = (
            torch.tensor(of_tier, device=keys.device)[tier.clamp(min=0)]
            for of_tier in (formats.key_of_tier, formats.value_of_tier)
        )
        return CodedTokens(
            keys[of_key, token, head].masked_fill_(gone, 0),
            values[of_value, token, head].masked_fill_(gone, 0),
            kept,
        )

    def _every_tier(self, layer: int) -> tuple[Tensor, Tensor]:
        """(n_formats, n_context, n_kv_heads, head_dim) of keys and of values."""
        dense, formats = self.context.layers[layer], TierFormats.of(self.tiers)
        keys, values = (x[0].transpose(0, 1).float() for x in (dense.keys, dense.values))
        positions = torch.arange(keys.shape[0], device=keys.device)
        framed = self.frames.keys_to_frame(layer, keys, positions)
        framed_values = self.frames.values_to_frame(values)
        return (
            torch.stack(
                [
                    self.frames.keys_from_frame(layer, through(one, framed), positions)
                    for one in formats.key_formats
                ]
            ),
            torch.stack(
                [
                    self.frames.output_from_frame(through(one, framed_values))
                    for one in formats.value_formats
                ]
            ),
        )
