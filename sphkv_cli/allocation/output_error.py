"""The error that really reaches the attention output, measured with the horizon's queries.

    measured = sum_h F_h E_i ||o_hat_{h,i} - o_{h,i}||^2        per (layer, KV head)

o is exact attention over the dense context and the dense horizon; o_hat reads coded keys and values
for the context, without the dropped tokens.  A coded key changes a logit by softmax_scale q'.e, so
the same formula serves every frame.  Every predicted cost of this package models this number.
"""

import torch
from torch import Tensor

from sphkv_cli.allocation.attention_utility import visible
from sphkv_cli.allocation.context import LayerContext


def horizon_output_error(
    context: LayerContext, keys_hat: Tensor, values_hat: Tensor, dropped: Tensor | None = None
) -> Tensor:
    """Weighted squared output error, (n_kv_heads) float64.

    Args:
        keys_hat, values_hat: (n_context, n_kv_heads, head_dim) decoded, in the frame.
        dropped: (n_context, n_kv_heads) bool, tokens that are not there at all.
    """
    rows = context.split.horizon_rows
    n_context, n_kv_heads = context.n_context, context.keys.shape[1]
    group_size = context.queries.shape[1] // n_kv_heads
    seen = visible(context.positions[rows], context.keys.shape[0], context.geometry.window)
    cap = context.geometry.logit_softcap
    found = []
    for kv_head in range(n_kv_heads):
        heads = slice(kv_head * group_size, (kv_head + 1) * group_size)
        q = context.queries[rows, heads].transpose(0, 1)
        q_framed = context.queries_framed[rows, heads].transpose(0, 1)
        v = context.values_framed[:, kv_head]
        logits = q @ context.keys[:, kv_head].T * context.geometry.softmax_scale
        key_error = keys_hat[:, kv_head] - context.keys_framed[:n_context, kv_head]
        shift = q_framed @ key_error.T * context.geometry.softmax_scale
        coded = logits.clone()
        coded[..., :n_context] += shift
        hidden = ~seen
        if cap > 0:
            logits, coded = (torch.tanh(x / cap) * cap for x in (logits, coded))
        exact = torch.softmax(logits.masked_fill_(hidden, -torch.inf), dim=-1) @ v
        coded.masked_fill_(hidden, -torch.inf)
        if dropped is not None:
            coded[..., :n_context].masked_fill_(dropped[:, kv_head], -torch.inf)
        p = torch.softmax(coded, dim=-1)
        output = p[..., :n_context] @ values_hat[:, kv_head] + p[..., n_context:] @ v[n_context:]
        error = ((output - exact) ** 2).sum(-1, dtype=torch.float64).mean(-1)
        found.append((error * context.head_weights[heads].to(torch.float64)).sum())
    return torch.stack(found)
