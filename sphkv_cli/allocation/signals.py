"""Signals of a token's future need, each from what is known when the context is coded.

With p the attention of a captured query of the context on the token, summed over the query heads of
its KV head; "drop damage" is E[(p / (1 - p))^2 ||v - o||^2], weighted (attention_utility.py):

    window, half-window        drop damage to the last queries of the context
    window-attention           mean of p over the window's queries (SnapKV 2404.14469, unpooled)
    window-pooled, half-...    the same, averaged over 7 neighbouring tokens (SnapKV as published)
    accumulated                sum of p over all queries (H2O 2306.14048)
    normalised                 the same over the number of queries that see the token
    calibration-queries        drop damage to queries of the fit documents, asked from the horizon
    expected-attention         sum_h F_h (E[p] ||v||)^2 for Gaussian queries, over the horizon
    key-norm, value-norm       1 / ||k||, ||v||
    recency                    1 / (tokens from the end)

Every signal is >= 0, higher = needed more; its scale is free.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_cli.allocation.attention_utility import token_utility, visible
from sphkv_cli.allocation.context import LayerContext
from sphkv_cli.allocation.signal_inputs import SignalInputs, filled, half_start, window_start

POOLED_TOKENS = 7
HORIZON_POSITIONS = 8
"""Positions of the horizon that Gaussian queries are asked from."""


@dataclass(frozen=True)
class Signal:
    """One signal.

    compute: (n_kv_heads, n_context) float64 >= 0; needs_future: uses `SignalInputs.queries`;
    reads_all_queries: of the context, not only those of its window.
    """

    name: str
    description: str
    compute: Callable[[SignalInputs], Tensor]
    needs_future: bool = False
    reads_all_queries: bool = False


def _window(inputs: SignalInputs) -> Tensor:
    context = inputs.context
    return filled(context, context.window_utility.drop, window_start(context)) * context.reach()


def _half_window(inputs: SignalInputs) -> Tensor:
    context = inputs.context
    start, rows = half_start(context), context.split.window_rows
    first = int((context.positions[: rows.stop] < start).sum())
    drop = _drop(context, context.queries[first : rows.stop], context.positions[first : rows.stop])
    return filled(context, drop, start) * context.reach()


def _window_attention(inputs: SignalInputs) -> Tensor:
    return inputs.window_attention * inputs.context.reach()


def _window_pooled(inputs: SignalInputs) -> Tensor:
    return _pooled(inputs.window_attention) * inputs.context.reach()


def _half_window_pooled(inputs: SignalInputs) -> Tensor:
    return _pooled(inputs.half_window_attention) * inputs.context.reach()


def _accumulated(inputs: SignalInputs) -> Tensor:
    return inputs.attention.sums * inputs.context.reach()


def _normalised(inputs: SignalInputs) -> Tensor:
    return inputs.attention.means * inputs.context.reach()


def _calibration_queries(inputs: SignalInputs) -> Tensor:
    context, future = inputs.context, inputs.queries
    positions = inputs.horizon_positions(future.sample.shape[1])
    asked = future.asked_from(context.layer, positions)
    # Beyond a sliding window a query sees nothing of the context, and nothing is lost to it.
    seeing = visible(positions, context.n_context, context.geometry.window).any(dim=1)
    drop = _drop(context, asked[seeing], positions[seeing], seeing=False)
    return drop * seeing.double().mean()


def _expected_attention(inputs: SignalInputs) -> Tensor:
    context, future = inputs.context, inputs.queries
    n, layer, scale = context.n_context, context.layer, context.geometry.softmax_scale
    positions = inputs.horizon_positions(HORIZON_POSITIONS)
    hidden = ~visible(positions, n, context.geometry.window)
    mean = torch.from_numpy(future.mean[layer]).to(context.keys.device).double()
    covariance = torch.from_numpy(future.covariance[layer]).to(context.keys.device).double()
    group_size = mean.shape[0] // inputs.n_kv_heads
    weights = context.head_weights.double()
    found = []
    for kv_head in range(inputs.n_kv_heads):
        key = context.keys[:n, kv_head].double()
        value_sq = context.values[:n, kv_head].double().square().sum(-1)
        total = torch.zeros(n, dtype=torch.float64)
        for position, out_of_sight in zip(positions, hidden, strict=True):
            # q.k with q turned to the position = q_0 . (k turned back by it).
            back = future.turned(layer, key[:, None], -position.expand(n))[:, 0]
            for head in range(kv_head * group_size, (kv_head + 1) * group_size):
                logits = scale * (back @ mean[head])
                logits += scale**2 / 2 * ((back @ covariance[head]) * back).sum(-1)
                if context.geometry.logit_softcap > 0:
                    cap = context.geometry.logit_softcap
                    logits = cap * torch.tanh(logits / cap)
                p = torch.softmax(logits.masked_fill(out_of_sight, -torch.inf), dim=-1)
                total += weights[head] * p.nan_to_num(0.0).square() * value_sq
        found.append(total)
    return torch.stack(found)


def _key_norm(inputs: SignalInputs) -> Tensor:
    norms = _norms(inputs.context, inputs.context.keys)
    return norms.clamp(min=1e-12).reciprocal() * _reach(inputs)


def _value_norm(inputs: SignalInputs) -> Tensor:
    return _norms(inputs.context, inputs.context.values) * _reach(inputs)


def _recency(inputs: SignalInputs) -> Tensor:
    n = inputs.context.n_context
    distance = torch.arange(n, 0, -1, dtype=torch.float64)
    return (inputs.context.reach() / distance).expand(inputs.n_kv_heads, n).clone()


SIGNALS: dict[str, Signal] = {
    signal.name: signal
    for signal in (
        Signal(
            "window",
            "E[(p / (1 - p))^2 ||v - o||^2] over the last queries of the context",
            _window,
        ),
        Signal("half-window", "the same over the later half of the window", _half_window),
        Signal("window-attention", "mean attention of the window's queries", _window_attention),
        Signal("window-pooled", "the same, averaged over 7 neighbours (SnapKV)", _window_pooled),
        Signal(
            "half-window-pooled",
            "the same over the later half of the window",
            _half_window_pooled,
        ),
        Signal(
            "accumulated",
            "attention summed over the context's queries (H2O)",
            _accumulated,
            reads_all_queries=True,
        ),
        Signal(
            "normalised",
            "mean attention of the context's queries that see it",
            _normalised,
            reads_all_queries=True,
        ),
        Signal(
            "calibration-queries",
            "E[(p / (1 - p))^2 ||v - o||^2] over queries of the fit documents, from the horizon",
            _calibration_queries,
            needs_future=True,
        ),
        Signal(
            "expected-attention",
            "expected attention of Gaussian queries over the horizon, times ||v||",
            _expected_attention,
            needs_future=True,
        ),
        Signal("key-norm", "1 / ||k||", _key_norm),
        Signal("value-norm", "||v||", _value_norm),
        Signal("recency", "1 / (distance to the end of the context)", _recency),
    )
}


def _drop(
    context: LayerContext, queries: Tensor, positions: Tensor, *, seeing: bool = True
) -> Tensor:
    n = context.n_context
    return token_utility(
        queries,
        queries.double().square().sum(-1),
        positions,
        context.keys[:n],
        context.values[:n],
        context.head_weights,
        context.geometry,
        n_context=n,
        mean_over="seeing" if seeing else "all",
    ).drop


def _pooled(scores: Tensor) -> Tensor:
    half = POOLED_TOKENS // 2
    pooled: Tensor = torch.nn.functional.avg_pool1d(
        scores[:, None], POOLED_TOKENS, stride=1, padding=half, count_include_pad=False
    )
    return pooled[:, 0]


def _norms(context: LayerContext, vectors: Tensor) -> Tensor:
    norms: Tensor = vectors[: context.n_context].double().norm(dim=-1).T
    return norms


def _reach(inputs: SignalInputs) -> Tensor:
    """1 where a later query can see the token, else 0."""
    return (inputs.context.reach() > 0).double()
