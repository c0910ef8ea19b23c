"""Attention in which every query reads coded tokens far away and dense ones near, in one softmax.

    o_i = sum_j p_ij v~_j,   p_i = softmax_j(scale q_i . k~_j),   (k~, v~)_j = (khat, vhat)_j or
    (k, v)_j as `ReadProtocol.reads_coded(i, j)` says

All positions of a document go through the model at once: keys and values of a layer are those of
hidden states that themselves read the coded cache, so this is stepwise decoding, in parallel.  The
queries are taken in blocks; a block sees [coded columns | dense columns] under one boolean mask.
Source: ours; the mathematics is softmax attention.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sphkv_cli.errors import SphkvError
from sphkv_cli.evaluation.coding import CodedTokens, KeyValueCoding
from sphkv_cli.evaluation.protocol import ReadProtocol
from sphkv_cli.models.geometry import ModelGeometry

QUERY_BLOCK = 256
_NAME = "sphkv_coded"


@dataclass
class CodedRun:
    """One forward pass that reads through `coding`; counts the keys that it left dense.

    modules: the attention modules of the model in layer order.
    """

    geometry: ModelGeometry
    modules: Sequence[Any]
    coding: KeyValueCoding
    protocol: ReadProtocol
    n_dense_keys: int = 0
    _layer_of: dict[int, int] = field(init=False)
    _heard: set[int] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self.protocol.check_group(self.coding.name, self.coding.token_group)
        self._layer_of = {id(module): index for index, module in enumerate(self.modules)}

    def check_complete(self) -> None:
        """Raise SphkvError unless every layer attended through this run."""
        for index, layer in enumerate(self.geometry.layers):
            if index not in self._heard:
                raise SphkvError(
                    f"layer {layer.name} never called attention, so it read no coded cache",
                    "its architecture is not supported",
                )

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Output (1, n_tokens, n_q_heads, head_dim) for query, key, value (1, heads, n_tokens, d).

        Raises:
            SphkvError: a module that is not a layer's attention, or a batch.
        """
        layer = self._layer_of.get(id(module))
        if layer is None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
            raise SphkvError(
                f"{type(module).__name__} attends in a way that cannot be evaluated "
                f"(queries {tuple(query.shape)}, keys {tuple(key.shape)})",
                "its architecture is not supported",
            )
        self._heard.add(layer)
        described = self.geometry.layers[layer]
        positions = torch.arange(key.shape[2], device=key.device)
        coded = self._code(layer, key, value, positions)
        columns = CacheColumns.of(key, value, coded, query.shape[1])
        found = columns.attend(
            query[0],
            positions,
            self.protocol,
            window=described.window,
            scale=described.softmax_scale,
            softcap=described.logit_softcap,
        )
        return found.transpose(0, 1)[None].contiguous()

    def _code(self, layer: int, key: Tensor, value: Tensor, positions: Tensor) -> CodedTokens:
        n_tokens = key.shape[2]
        span = self.protocol.coded_span(n_tokens, self.coding.token_group)
        coded = self.coding.code(
            layer,
            key[0, :, :span].transpose(0, 1).float(),
            value[0, :, :span].transpose(0, 1).float(),
            positions[:span],
        )
        if coded.dense_keys is not None:
            stored = self.protocol.coded_positions(n_tokens)
            self.n_dense_keys += int(coded.dense_keys[stored.start : stored.stop].sum())
        return coded


@dataclass(frozen=True)
class CacheColumns:
    """Coded and dense keys and values of one layer, (n_kv_heads, n_tokens, head_dim) each."""

    dense_keys: Tensor
    dense_values: Tensor
    coded_keys: Tensor
    coded_values: Tensor
    kept: Tensor | None
    group_size: int

    @staticmethod
    def of(key: Tensor, value: Tensor, coded: CodedTokens, n_q_heads: int) -> "CacheColumns":
        kept = None if coded.kept is None else coded.kept.transpose(0, 1)
        return CacheColumns(
            dense_keys=key[0],
            dense_values=value[0],
            coded_keys=coded.keys.transpose(0, 1).to(key.dtype),
            coded_values=coded.values.transpose(0, 1).to(value.dtype),
            kept=None if kept is None or bool(kept.all()) else kept,
            group_size=n_q_heads // key.shape[1],
        )

    def attend(
        self,
        query: Tensor,
        positions: Tensor,
        protocol: ReadProtocol,
        *,
        window: int,
        scale: float,
        softcap: float,
    ) -> Tensor:
        """Output (n_q_heads, n_queries, head_dim) of queries (n_q_heads, n_queries, head_dim).

        In blocks of queries: the mask of all at once grows with their number times the cache's.
        """
        blocks = [
            self._attend(
                query[:, start : start + QUERY_BLOCK],
                positions[start : start + QUERY_BLOCK],
                protocol,
                window,
                scale,
                softcap,
            )
            for start in range(0, query.shape[1], QUERY_BLOCK)
        ]
        return torch.cat(blocks, dim=1)

    def _attend(
        self,
        query: Tensor,
        positions: Tensor,
        protocol: ReadProtocol,
        window: int,
        scale: float,
        softcap: float,
    ) -> Tensor:
        tokens = torch.arange(int(positions[-1]) + 1, device=query.device)
        distance = positions[:, None] - tokens[None, :]
        visible = distance >= 0
        if window:
            visible &= distance < window
        reads_coded = protocol.reads_coded(positions, tokens) & visible
        reads_dense = visible & ~reads_coded
        far = reads_coded.any(dim=0).nonzero()[:, 0]
        near = reads_dense.any(dim=0).nonzero()[:, 0]
        keys = torch.cat([self.coded_keys[:, far], self.dense_keys[:, near]], dim=1)
        values = torch.cat([self.coded_values[:, far], self.dense_values[:, near]], dim=1)
        mask = torch.cat([reads_coded[:, far], reads_dense[:, near]], dim=1)
        if self.kept is not None:
            is_there = torch.nn.functional.pad(self.kept[:, far], (0, near.numel()), value=True)
            mask = mask[None, None] & is_there[:, None, None, :]
        grouped = query.reshape(-1, self.group_size, *query.shape[1:])
        output = softmax_attention(grouped, keys[:, None], values[:, None], mask, scale, softcap)
        return output.flatten(0, 1)


def softmax_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float
) -> Tensor:
    """query (n_kv_heads, group_size, n_queries, d), keys and values (n_kv_heads, 1, n_keys, d)."""
    shape = (*query.shape[:2], keys.shape[-2], keys.shape[-1])
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    bias = bias.masked_fill(~mask, float("-inf"))
    if not softcap:
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys.expand(shape), values.expand(shape), attn_mask=bias, scale=scale
        )
    logits = scale * (query @ keys.transpose(-1, -2))
    capped = softcap * torch.tanh(logits / softcap)
    return torch.softmax((capped + bias).float(), dim=-1).to(values.dtype) @ values


class AttentionRun(Protocol):
    """One forward pass that attends in a way of its own."""

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `CodedRun.attend`."""


_ACTIVE: ContextVar[AttentionRun | None] = ContextVar("sphkv_coded_run", default=None)


@contextmanager
def reading_coded(model: Any, run: AttentionRun) -> Iterator[None]:
    """While inside, `model` attends through `run`; afterwards it is as before."""
    before = model.config._attn_implementation
    token = _ACTIVE.set(run)
    model.set_attn_implementation(_register())
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _ACTIVE.reset(token)


def _register() -> str:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(_NAME, _forward)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return _NAME


def _forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    run = _ACTIVE.get()
    assert run is not None, "the coded attention is registered only inside reading_coded"
    return run.attend(module, query, key, value), None
