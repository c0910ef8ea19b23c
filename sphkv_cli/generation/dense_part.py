"""Attention over tokens that lie dense, with its log-sum-exp, so that it can join the coded part.

    s_ij = softcap(scale q_i . k_j) where visible, else -inf
    lse_i = log sum_j exp s_ij,   o_i = sum_j exp(s_ij - lse_i) v_j

and `reference.merge_partial` adds the part that was read from codes.  Source: the softmax; the
merge as in FlashAttention's split over keys (arXiv 2205.14135).
"""

import torch
from torch import Tensor

from sphkv_kernels.reference import DecodeResult

_QUERY_BLOCK = 256


def dense_part(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    *,
    scale: float,
    softcap: float,
) -> DecodeResult:
    """Attention of queries over dense tokens.

    Args:
        queries: (n_sequences, n_q_heads, n_queries, d) in the dtype to compute in.
        keys, values: (n_sequences, n_kv_heads, n_tokens, d).
        visible: (n_sequences, n_queries, n_tokens) bool; None: every query sees every token.

    Returns:
        output (n_sequences, n_q_heads, n_queries, d), log_sum_exp without its last axis; 0 and
        -inf where a query sees no token.
    """
    n_sequences, n_q_heads, n_queries, d = queries.shape
    n_kv_heads = keys.shape[1]
    keys, values = keys.to(queries.dtype), values.to(queries.dtype)
    if visible is not None:
        # What is not visible may be uninitialised memory: an exact 0 times NaN would survive.
        unseen = ~visible.any(dim=1)[:, None, :, None]
        keys, values = keys.masked_fill(unseen, 0), values.masked_fill(unseen, 0)
    grouped = queries.reshape(n_sequences, n_kv_heads, -1, n_queries, d)
    outputs, sums = [], []
    for start in range(0, n_queries, _QUERY_BLOCK):
        block = slice(start, start + _QUERY_BLOCK)
        logits = scale * torch.einsum("shgqd,shtd->shgqt", grouped[:, :, :, block], keys)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if visible is not None:
            logits = logits.masked_fill(~visible[:, None, None, block], float("-inf"))
        lse = torch.logsumexp(logits, dim=-1)
        weights = torch.exp(logits - torch.where(torch.isfinite(lse), lse, 0.0)[..., None])
        outputs.append(torch.einsum("shgqt,shtd->shgqd", weights, values))
        sums.append(lse)
    output = torch.cat(outputs, dim=3).reshape(queries.shape)
    return DecodeResult(output, torch.cat(sums, dim=3).reshape(n_sequences, n_q_heads, n_queries))
