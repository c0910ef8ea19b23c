"""How much an error in one token's key or value, or its loss, would hurt the queries.

With p the attention of a query on the token, v its value, o the query's attention output, F_h the
weight of query head h and E the mean over the queries (ours; first order in every error):

    key    = sum_h F_h E[p^2 s^2 ||v - o||^2 ||q'||^2] softmax_scale^2 / head_dim   per ||e_k||^2
    value  = sum_h F_h E[p^2]                                                       per ||e_v||^2
    drop   = sum_h F_h E[(p / (1 - p))^2 ||v - o||^2]                    exact for one dropped token

summed over the query heads of the token's KV head; q' is the query in the frame, where the key
error is isotropic; s = 1 - tanh^2 is the slope of a logit soft cap (1 without one).  Everything is
float64: near p = 1 both 1 - p and ||v - o|| cancel.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Below this remainder 1 - p and ||v - o||^2 are rounding noise.
_LEAST_REMAINDER = 1e-7


@dataclass(frozen=True)
class LayerGeometry:
    """What attention in one layer needs to know.

    window: tokens a query sees including itself, 0 = all; logit_softcap: 0 = none.
    """

    softmax_scale: float
    window: int = 0
    logit_softcap: float = 0.0


@dataclass(frozen=True)
class TokenUtility:
    """Expected damage per token: key, value, drop, each (n_kv_heads, n_context) float64."""

    key: Tensor
    value: Tensor
    drop: Tensor


def visible(query_positions: Tensor, n_tokens: int, window: int) -> Tensor:
    """(n_queries, n_tokens) bool: causal, inside the sliding window."""
    distance = query_positions[:, None] - torch.arange(n_tokens)[None, :]
    seen = distance >= 0
    return seen & (distance < window) if window > 0 else seen


def attention(
    queries: Tensor, keys: Tensor, hidden: Tensor, geometry: LayerGeometry
) -> tuple[Tensor, Tensor | None]:
    """Exact attention of the query heads of one KV head.

    Args:
        queries: (group_size, n_queries, head_dim); keys: (n_tokens, head_dim), float64.
        hidden: (n_queries, n_tokens) bool.

    Returns:
        probabilities (group_size, n_queries, n_tokens), and with a soft cap s = 1 - tanh^2 of the
        same shape.
    """
    logits = (queries * geometry.softmax_scale) @ keys.T
    slope = None
    if geometry.logit_softcap > 0:
        capped = logits.div_(geometry.logit_softcap).tanh_()
        slope = 1 - capped.square()
        logits = capped.mul_(geometry.logit_softcap)
    return torch.softmax(logits.masked_fill_(hidden, -math.inf), dim=-1), slope


def token_utility(
    queries: Tensor,
    query_norms_sq: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    values: Tensor,
    head_weights: Tensor,
    geometry: LayerGeometry,
    *,
    n_context: int,
    mean_over: Literal["all", "seeing"],
) -> TokenUtility:
    """Utility of the first `n_context` tokens for the given queries.

    Args:
        queries: (n_queries, n_q_heads, head_dim).
        query_norms_sq: (n_queries, n_q_heads) ||q'||^2 in the frame.
        query_positions: (n_queries) int64, each below n_tokens.
        keys, values: (n_tokens, n_kv_heads, head_dim), dense.
        head_weights: (n_q_heads) F.
        mean_over: all queries, or those that see the token: the last tokens of a context are seen
            by few of its own queries, and by all that come later.
    """
    n_queries, n_q_heads, head_dim = queries.shape
    n_tokens, n_kv_heads, _ = keys.shape
    group_size = n_q_heads // n_kv_heads
    seen = visible(query_positions, n_tokens, geometry.window)
    n_seeing = torch.full((n_context,), float(n_queries), dtype=torch.float64)
    if mean_over == "seeing":
        n_seeing = seen[:, :n_context].sum(dim=0).clamp(min=1).to(torch.float64)
    hidden = ~seen
    scale_sq = geometry.softmax_scale**2 / head_dim
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for kv_head in range(n_kv_heads):
        heads = slice(kv_head * group_size, (kv_head + 1) * group_size)
        q = queries[:, heads].to(torch.float64).transpose(0, 1)
        k, v = keys[:, kv_head].to(torch.float64), values[:, kv_head].to(torch.float64)
        every_p, slope = attention(q, k, hidden, geometry)
        o = every_p @ v
        # One row per (query head, query) from here on.
        p = every_p[..., :n_context].reshape(-1, n_context)
        away_sq = _squared_distances(o.reshape(-1, head_dim), v[:n_context])
        weight = head_weights[heads].to(torch.float64).repeat_interleave(n_queries)
        ratio = (1 - p).clamp_(min=_LEAST_REMAINDER)
        torch.div(p, ratio, out=ratio)
        drop = weight @ ratio.square_().mul_(away_sq)
        p_sq = p.square()
        value = weight @ p_sq
        noise = away_sq.mul_(p_sq)
        if slope is not None:
            noise.mul_(slope[..., :n_context].reshape(-1, n_context).square())
        norms = query_norms_sq[:, heads].to(torch.float64).T.reshape(-1)
        key = (weight * norms) @ noise * scale_sq
        found.append((key / n_seeing, value / n_seeing, drop / n_seeing))
    key, value, drop = (torch.stack(column) for column in zip(*found, strict=True))
    return TokenUtility(key, value, drop)


def _squared_distances(one: Tensor, other: Tensor) -> Tensor:
    """||x - y||^2 of rows x (n, d) and y (m, d), in one matrix product: (n, m)."""
    left = torch.cat([-2 * one, (one**2).sum(-1, keepdim=True), torch.ones_like(one[:, :1])], -1)
    right = torch.cat([other, torch.ones_like(other[:, :1]), (other**2).sum(-1, keepdim=True)], -1)
    return (left @ right.T).clamp_(min=0)
