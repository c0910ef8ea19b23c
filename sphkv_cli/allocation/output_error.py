"""The error that really reaches the attention output, measured with the horizon's queries.

    measured = sum_h F_h E_i ||o_hat_{h,i} - o_{h,i}||^2        per (layer, KV head)

o is exact attention over the dense context and the dense horizon; o_hat reads coded keys and values
for the context, without the dropped tokens.  A coded key changes a logit by softmax_scale q'.e, so
the same formula serves every frame.  Every predicted cost of this package models this number.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_cli.allocation.attention_utility import visible
from sphkv_cli.allocation.context import LayerContext


@dataclass(frozen=True)
class HorizonAttention:
    """Exact attention of the horizon in one layer, against which any coding of it is measured.

    logits: per KV head (group_size, n_queries, n_tokens), scaled, not capped, -inf where hidden;
    outputs: (group_size, n_queries, head_dim) in the frame.
    """

    context: LayerContext
    logits: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @staticmethod
    def of(context: LayerContext) -> "HorizonAttention":
        """Attend once, in float32."""
        rows = context.split.horizon_rows
        seen = visible(context.positions[rows], context.keys.shape[0], context.geometry.window)
        hidden = ~seen
        logits, outputs = [], []
        for kv_head in range(context.keys.shape[1]):
            q = context.queries[rows, _group(context, kv_head)].transpose(0, 1)
            scaled = (q * context.geometry.softmax_scale) @ context.keys[:, kv_head].T
            scaled.masked_fill_(hidden, -torch.inf)
            logits.append(scaled)
            p = torch.softmax(_capped(scaled, context), dim=-1)
            outputs.append(p @ context.values_framed[:, kv_head])
        return HorizonAttention(context, tuple(logits), tuple(outputs))

    def output_error(
        self, keys_hat: Tensor, values_hat: Tensor, dropped: Tensor | None = None
    ) -> Tensor:
        """Weighted squared output error, (n_kv_heads) float64.

        Args:
            keys_hat, values_hat: (n_context, n_kv_heads, head_dim) decoded, in the frame.
            dropped: (n_context, n_kv_heads) bool, tokens that are not there at all.
        """
        context = self.context
        rows, n = context.split.horizon_rows, context.n_context
        found = []
        for kv_head, (exact_logits, exact) in enumerate(
            zip(self.logits, self.outputs, strict=True)
        ):
            heads = _group(context, kv_head)
            q = context.queries_framed[rows, heads].transpose(0, 1)
            key_error = keys_hat[:, kv_head] - context.keys_framed[:n, kv_head]
            coded = exact_logits.clone()
            coded[..., :n] += (q * context.geometry.softmax_scale) @ key_error.T
            if dropped is not None:
                coded[..., :n].masked_fill_(dropped[:, kv_head], -torch.inf)
            p = torch.softmax(_capped(coded, context), dim=-1)
            values = torch.cat([values_hat[:, kv_head], context.values_framed[n:, kv_head]])
            error = ((p @ values - exact) ** 2).sum(-1, dtype=torch.float64).mean(-1)
            found.append((error * context.head_weights[heads].to(torch.float64)).sum())
        return torch.stack(found)


def _group(context: LayerContext, kv_head: int) -> slice:
    """The query heads of one KV head."""
    group_size = context.queries.shape[1] // context.keys.shape[1]
    return slice(kv_head * group_size, (kv_head + 1) * group_size)


def _capped(logits: Tensor, context: LayerContext) -> Tensor:
    """The soft cap; hidden logits stay -inf."""
    cap = context.geometry.logit_softcap
    if cap <= 0:
        return logits
    return torch.where(logits.isneginf(), logits, torch.tanh(logits / cap) * cap)
