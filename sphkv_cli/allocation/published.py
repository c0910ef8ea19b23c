"""Published eviction methods: how many tokens each KV head keeps in bf16, and which.

Tokens of a KV head are ordered by the method's own score; the first ones of that order are kept,
the rest is dropped.  Their papers keep tokens, not pages: no padding is counted here.

    score     mean over the last WINDOW queries and the heads of the group of their attention,
              max-pooled over KERNEL neighbouring tokens; the window itself is always kept
              (SnapKV, arXiv 2404.14469: window 32, kernel 7, max-pooling as in its LongBench runs;
              the mean over a GQA group as in Ada-KV's code)
    SnapKV    every head of every layer keeps the same number C
    PyramidKV beside the window the number falls linearly over the layers from 2 P - m to m = P/20,
              P = C - WINDOW their mean (arXiv 2406.02069, beta = 20)
    Ada-KV    every layer keeps the same number; beside the window its heads share by their part of
              the layer's largest scores, 20 % of it evenly (arXiv 2407.11550, alpha = 0.2)

What rounding leaves over goes to the heads of largest remainder.  Source: the papers.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sphkv_cli.allocation.attention_utility import attention, visible
from sphkv_cli.allocation.context import LayerContext

Float = NDArray[np.float64]
Int = NDArray[np.int64]

WINDOW = 32
KERNEL = 7
PYRAMID_BETA = 20
ADA_FLOOR = 0.2


def snapkv_scores(context: LayerContext) -> Tensor:
    """(n_kv_heads, n_context) float64 >= 0; the window's tokens are infinite, the latest first
    among equals is left to the caller's stable order."""
    n, rows = context.n_context, context.split.window_rows
    asked = torch.arange(max(rows.start, rows.stop - WINDOW), rows.stop)
    seen = visible(context.positions[asked], n, context.geometry.window)
    n_kv_heads = context.keys.shape[1]
    group_size = context.queries.shape[1] // n_kv_heads
    found = []
    for kv_head in range(n_kv_heads):
        heads = slice(kv_head * group_size, (kv_head + 1) * group_size)
        queries = context.queries[asked][:, heads].double().transpose(0, 1)
        p, _ = attention(queries, context.keys[:n, kv_head].double(), ~seen, context.geometry)
        found.append(p.mean(dim=(0, 1)))
    scores = torch.stack(found)
    pooled: Tensor = torch.nn.functional.max_pool1d(
        scores[:, None], KERNEL, stride=1, padding=KERNEL // 2
    )[:, 0]
    pooled[:, max(n - WINDOW, 0) :] = torch.inf
    return pooled


def even_counts(total: int, most: int, n_layers: int, n_kv_heads: int) -> Int:
    """(n_layers, n_kv_heads) tokens (or pages) of `total`, evenly, at most `most` each."""
    return _rounded(np.ones((n_layers, n_kv_heads)), total, most)


def pyramid_counts(total: int, n_context: int, n_layers: int, n_kv_heads: int) -> Int:
    """(n_layers, n_kv_heads) tokens of `total`, falling over the layers."""
    mean = total / (n_layers * n_kv_heads)
    window = min(mean, WINDOW)
    past = mean - window
    least = past / PYRAMID_BETA
    most = 2 * past - least
    if most > n_context - window:
        most, least = n_context - window, max(2 * past - (n_context - window), 0.0)
    per_layer = window + np.linspace(most, least, n_layers)
    return _rounded(np.repeat(per_layer[:, None], n_kv_heads, axis=1), total, n_context)


def ada_counts(scores: Float, total: int) -> Int:
    """(n_layers, n_kv_heads) tokens of `total`, by each head's part of its layer's best tokens.

    Args:
        scores: (n_layers, n_kv_heads, n_context) of `snapkv_scores`.
    """
    n_layers, n_kv_heads, n_context = scores.shape
    mean = total / (n_layers * n_kv_heads)
    window = min(mean, WINDOW)
    past = mean - window
    is_past = np.isfinite(scores)
    n_best = min(round(past * n_kv_heads), int(is_past[0].sum()))
    share = np.empty((n_layers, n_kv_heads))
    for layer in range(n_layers):
        past_scores = np.where(is_past[layer], scores[layer], -np.inf)
        best = np.argsort(-past_scores, axis=None, kind="stable")[:n_best]
        adaptive = np.bincount(best // n_context, minlength=n_kv_heads)
        share[layer] = window + (1 - ADA_FLOOR) * adaptive + ADA_FLOOR * past
    return _rounded(share, total, n_context)


def _rounded(weights: Float, total: int, most: int) -> Int:
    """Whole numbers in proportion to the weights, each at most `most`, `total` of them in all."""
    total = min(total, weights.size * most)
    target = np.minimum(weights * (total / max(weights.sum(), 1e-300)), most)
    for _ in range(64):
        # What full heads cannot take goes to the others in proportion.
        short = total - target.sum()
        room = (target < most) & (weights > 0)
        if short <= 1e-9 or not room.any():
            break
        target[room] += short * weights[room] / weights[room].sum()
        target = np.minimum(target, most)
    counts: Int = np.floor(target + 1e-9).astype(np.int64)
    order = np.argsort(-(target - counts), axis=None, kind="stable")
    while counts.sum() < total:
        for place in order:
            if counts.sum() >= total:
                break
            if counts.flat[place] < most:
                counts.flat[place] += 1
    return counts
