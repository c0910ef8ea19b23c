"""Codings of one context, each read by the tokens after it: the retention protocol, cheaply.

The context is prefilled once (`retained_context.py`); a coding codes its keys and values layer by
layer as they are first read, and only the tokens after it run again.  Plans over the same tiers
share every token coded in every tier.  Source: ours; equal to `JudgedModel.coded_hidden` under
`RetentionProtocol` to rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphkv_cli.evaluation.coding import CodedTokens, KeyValueCoding
from sphkv_cli.evaluation.masked_attention import CacheColumns, reading_coded
from sphkv_cli.evaluation.plan_coding import PlanCoding
from sphkv_cli.evaluation.protocol import RetentionProtocol
from sphkv_cli.evaluation.retained_context import ContextTiers, RetainedContext
from sphkv_kernels.tier import TierFormat

_CodeOf = Callable[[int], CodedTokens]


@dataclass(frozen=True, eq=False)
class ContextReader:
    """context: prefilled; shared: the tiers that plans have in common, None where none do."""

    context: RetainedContext
    shared: ContextTiers | None

    @staticmethod
    def of(context: RetainedContext, codings: Sequence[KeyValueCoding]) -> "ContextReader":
        """Make ready to read `codings`; their plans share tiers where at least two do."""
        plans = [coding for coding in codings if isinstance(coding, PlanCoding)]
        if len(plans) < 2:
            return ContextReader(context, None)
        return ContextReader(context, ContextTiers(plans[0].tiers, plans[0].frames, context))

    def read(self, coding: KeyValueCoding) -> tuple[Tensor, int]:
        """Final hidden states (n_tokens - n_context, hidden_dim) of the tokens after the context,
        and the keys that the coding left dense.

        Raises:
            SphkvError: the device ran out of memory.
        """
        run = _Reading(self.context, self._code_of(coding))
        model, ids = self.context.model, self.context.following
        with reading_coded(model.model, run):
            hidden = model.continued_hidden(ids.to(model.model.device), self.context.n_context)
        return hidden, run.n_dense_keys

    def _code_of(self, coding: KeyValueCoding) -> _CodeOf:
        shared = self.shared
        if (
            shared is not None
            and isinstance(coding, PlanCoding)
            and coding.frames is shared.frames
            and _same_tiers(coding.tiers, shared.tiers)
        ):
            plan = coding.tier_of_token
            return lambda layer: shared.tokens(layer, plan[layer])

        def alone(layer: int) -> CodedTokens:
            dense = self.context.layers[layer]
            keys, values = (x[0].transpose(0, 1).float() for x in (dense.keys, dense.values))
            return coding.code(layer, keys, values, torch.arange(len(keys), device=keys.device))

        return alone


def _same_tiers(some: Sequence[TierFormat], others: Sequence[TierFormat]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


@dataclass
class _Reading:
    """Attention of the tokens after the context over its code and over themselves."""

    context: RetainedContext
    code_of: _CodeOf
    n_dense_keys: int = 0

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        model, n_context = self.context.model, self.context.n_context
        layer = next(i for i, known in enumerate(model.modules) if known is module)
        dense, described = self.context.layers[layer], model.geometry.layers[layer]
        coded = self.code_of(layer)
        if coded.dense_keys is not None:
            self.n_dense_keys += int(coded.dense_keys.sum())
        columns = CacheColumns.of(
            torch.cat([dense.keys, key], dim=2),
            torch.cat([dense.values, value], dim=2),
            coded,
            query.shape[1],
        )
        positions = torch.arange(n_context, n_context + query.shape[2], device=query.device)
        found = columns.attend(
            query[0],
            positions,
            RetentionProtocol(n_context),
            window=described.window,
            scale=described.softmax_scale,
            softcap=described.logit_softcap,
        )
        return found.transpose(0, 1)[None].contiguous()
