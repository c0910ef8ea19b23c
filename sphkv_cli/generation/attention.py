"""The attention function that transformers calls: dense where nothing is coded yet, else merged.

    prompt       softmax over the prompt itself, dense, by transformers' own function
    later        [pages of codes] + [dense tail and new tokens], joined by their log-sum-exps

`SphericalCache` hands itself over between a layer's cache update and its attention, which follow
each other in every model; a forward pass without such a cache attends as it always did.
Source: ours.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sphkv_cli.evaluation.masked_attention import softmax_attention

NAME = "sphkv_spherical"


class AttendingCache(Protocol):
    """What attends in place of the dense function."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, call: "AttentionCall"
    ) -> Tensor:
        """Output (n_sequences, n_queries, n_q_heads, d)."""


@dataclass(frozen=True)
class AttentionCall:
    """What a model passes besides queries, keys and values."""

    module: Any
    mask: Tensor | None
    options: dict[str, Any]


@dataclass(frozen=True)
class Handed:
    """A cache that waits for the attention of one layer to these very keys."""

    cache: AttendingCache
    layer: int
    keys: Tensor


HANDED: ContextVar[Handed | None] = ContextVar("sphkv_handed", default=None)


def register() -> str:
    """Make the function known to transformers; returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return NAME


def _forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    call = AttentionCall(module, attention_mask, options)
    handed = HANDED.get()
    if handed is None or handed.keys is not key:
        return attend_dense(query, key, value, call), None
    HANDED.set(None)
    return handed.cache.attend(handed.layer, query, key, value, call), None


def attend_dense(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
    """As the model would attend without codes: (n_sequences, n_queries, n_q_heads, d)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    softcap = call.options.get("softcap") or 0.0
    if not softcap:
        output: Tensor
        output, _ = sdpa_attention_forward(
            call.module, query, key, value, call.mask, **call.options
        )
        return output
    n_queries, n_keys = query.shape[2], key.shape[2]
    mask = call.mask
    if mask is None:
        rows = torch.arange(n_queries, device=query.device)[:, None] + n_keys - n_queries
        mask = (torch.arange(n_keys, device=query.device)[None] <= rows)[None, None]
    outputs = []
    for q, k, v, seen in zip(query, key, value, mask.expand(len(query), -1, -1, -1), strict=True):
        grouped = q.reshape(k.shape[0], -1, n_queries, q.shape[-1])
        attended = softmax_attention(
            grouped, k[:, None], v[:, None], seen[0], float(call.options["scaling"]), softcap
        )
        outputs.append(attended.flatten(0, 1))
    return torch.stack(outputs).transpose(1, 2).contiguous()
