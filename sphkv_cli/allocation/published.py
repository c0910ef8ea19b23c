"""Published eviction methods on our pages: how many dense pages each KV head keeps, and which.

Tokens of a KV head are ordered by the method's own score; the first pages of that order are kept in
bf16, the rest is dropped, so all methods spend the same laid-out bytes with no padding.

    score     mean over the last WINDOW queries and the heads of the group of their attention,
              max-pooled over KERNEL neighbouring tokens; the window itself is always first
              (SnapKV, arXiv 2404.14469: window 32, kernel 7, max-pooling as in its LongBench runs;
              the mean over a GQA group as in Ada-KV's code)
    SnapKV    every head of every layer keeps the same number
    PyramidKV the number falls linearly over the layers from 2 C - m to m = C / 20, C their mean
              (arXiv 2406.02069, beta = 20)
    Ada-KV    every layer keeps the same number; inside it heads share by their part of the layer's
              largest scores, 20 % of it evenly (arXiv 2407.11550, alpha = 0.2)

What rounding to pages leaves over goes to the heads of largest remainder.  Source: the papers; the
rounding to pages is ours.
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


def snapkv_pages(total: int, n_pages: int, n_layers: int, n_kv_heads: int) -> Int:
    """(n_layers, n_kv_heads) pages of `total`, evenly."""
    return _rounded(np.ones((n_layers, n_kv_heads)), total, n_pages)


def pyramid_pages(total: int, n_pages: int, n_layers: int, n_kv_heads: int) -> Int:
    """(n_layers, n_kv_heads) pages of `total`, falling over the layers."""
    mean = total / (n_layers * n_kv_heads)
    least = mean / PYRAMID_BETA
    most = 2 * mean - least
    if most > n_pages:
        most, least = float(n_pages), 2 * mean - n_pages
    per_layer = np.linspace(most, least, n_layers)
    return _rounded(np.repeat(per_layer[:, None], n_kv_heads, axis=1), total, n_pages)


def ada_pages(scores: Float, total: int, page_size: int) -> Int:
    """(n_layers, n_kv_heads) pages of `total`, by each head's part of its layer's best tokens.

    Args:
        scores: (n_layers, n_kv_heads, n_context) of `snapkv_scores`.
    """
    n_layers, n_kv_heads, n_context = scores.shape
    n_pages = -(-n_context // page_size)
    mean = total / (n_layers * n_kv_heads)
    share = np.empty((n_layers, n_kv_heads))
    n_best = min(round(mean * n_kv_heads * page_size), n_kv_heads * n_context)
    for layer in range(n_layers):
        best = np.argsort(-scores[layer], axis=None, kind="stable")[:n_best]
        counts = np.bincount(best // n_context, minlength=n_kv_heads)
        adaptive = counts / page_size
        share[layer] = (1 - ADA_FLOOR) * adaptive + ADA_FLOOR * mean
    return _rounded(share, total, n_pages)


def _rounded(weights: Float, total: int, n_pages: int) -> Int:
    """Whole pages in proportion to the weights, each at most n_pages, `total` of them in all."""
    total = min(total, weights.size * n_pages)
    target = np.minimum(weights * (total / max(weights.sum(), 1e-300)), n_pages)
    for _ in range(64):
        # What full heads cannot take goes to the others in proportion.
        short = total - target.sum()
        room = (target < n_pages) & (weights > 0)
        if short <= 1e-9 or not room.any():
            break
        target[room] += short * weights[room] / weights[room].sum()
        target = np.minimum(target, n_pages)
    counts: Int = np.floor(target + 1e-9).astype(np.int64)
    order = np.argsort(-(target - counts), axis=None, kind="stable")
    for place in np.tile(order, n_pages + 1):
        if counts.sum() >= total:
            break
        if counts.flat[place] < n_pages:
            counts.flat[place] += 1
    return counts
