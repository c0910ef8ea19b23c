"""What the kernel and its float64 reference ask alike of the arguments of a decode step.

Source: ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sphkv_kernels.cache import PagedCache
from sphkv_kernels.tier import PageError

MOST_TOKENS = (1 << 31) - 1


def group_size_of(query: Tensor, cache: PagedCache) -> int:
    """Query heads per KV head of a query ``(n_sequences, n_q_heads, head_dim)``.

    Raises:
        PageError: a query of another shape, or a cache of no KV head.
    """
    if query.ndim != 3 or query.shape[0] != cache.n_sequences or query.shape[2] != cache.head_dim:
        raise PageError(
            f"query is {tuple(query.shape)}, expected ({cache.n_sequences} sequences, n_q_heads, "
            f"head_dim {cache.head_dim})"
        )
    n_q_heads, n_kv_heads = query.shape[1], cache.n_kv_heads
    if n_q_heads == 0 or n_kv_heads == 0 or n_q_heads % n_kv_heads:
        raise PageError(
            f"{n_q_heads} query heads do not divide into groups over {n_kv_heads} KV heads"
        )
    return n_q_heads // n_kv_heads


def check_window(cache: PagedCache, window: int, query_positions: Tensor | None) -> None:
    """Refuse (PageError) a window that is none, or one without the positions that it needs."""
    if not 0 <= window <= MOST_TOKENS:
        raise PageError(
            f"window {window}: 0 for full attention, else a number of tokens up to {MOST_TOKENS}"
        )
    if not window:
        return
    if query_positions is None or cache.positions is None:
        raise PageError("a sliding window needs query_positions and a cache built with positions")
    _check_tail_positions(cache)
    if tuple(query_positions.shape) != (cache.n_sequences,) or (
        query_positions.dtype.is_floating_point or query_positions.dtype == torch.bool
    ):
        raise PageError(
            f"query_positions is {tuple(query_positions.shape)} {query_positions.dtype}, expected "
            f"({cache.n_sequences},) integer, one per sequence"
        )


def check_position_term(cache: PagedCache) -> None:
    """Refuse (PageError) a position term over a cache that does not know its positions."""
    if cache.positions is None:
        raise PageError("a position term needs a cache built with positions")
    _check_tail_positions(cache)


def check_scale(softmax_scale: float, logit_softcap: float) -> None:
    """Refuse (PageError) a scale that is no number, and a soft-cap that caps nothing."""
    if not math.isfinite(softmax_scale):
        raise PageError(f"softmax_scale {softmax_scale}: it must be finite")
    if not 0.0 <= logit_softcap < math.inf:
        raise PageError(f"logit_softcap {logit_softcap}: 0 for none, else positive and finite")


def _check_tail_positions(cache: PagedCache) -> None:
    if cache.tail_keys is not None and cache.tail_positions is None:
        raise PageError("a sliding window or a position term over a tail needs tail_positions")
