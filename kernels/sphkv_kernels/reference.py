"""Angle-Domain Attention (ADA) over a paged cache, in float64: what the kernel must compute.

For a query q and a coded key with angles psi^l_j and radii r_j (PolarQuant's recursion,
arXiv 2502.02617; attention in it after Spherical KV, arXiv 2605.18856):

    t^0 = q,   t^l_j = cos(psi^l_j) t^{l-1}_{2j-1} + sin(psi^l_j) t^{l-1}_{2j},
    logit = q.khat + offset + position term = sum_j r_j t^L_j + offset + position term,
    s = softcap(softmax_scale logit),   p = exp(s - log_sum_exp(s)),   output = sum p vhat.

The keys of spherical tiers are never rebuilt: their codes meet the query one level at a time.
Same signature as `sphkv_kernels.decode`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_kernels.cache import PagedCache
from sphkv_kernels.decode_arguments import (
    check_position_term,
    check_scale,
    check_window,
    group_size_of,
)
from sphkv_kernels.page_logits import page_logits, page_values
from sphkv_kernels.position_term import PositionTerm
from sphkv_kernels.tier import PageError


@dataclass(frozen=True)
class DecodeResult:
    """output ``(n_sequences, n_q_heads, head_dim)`` in the frame and log_sum_exp ``(n_sequences,
    n_q_heads)``, natural logarithm.  Without a live token: output 0, log_sum_exp -inf."""

    output: Tensor
    log_sum_exp: Tensor


@dataclass(frozen=True)
class LogitResult:
    """Logits q.khat + offset + position term, before the soft-cap, the scale and the softmax.

    pages: ``(n_entries, group_size, page_size)``, one row of tokens per page-table entry and query
    head of its group; -inf in dead rows and in rows outside the window.
    tail: ``(n_sequences, n_q_heads, tail_size)``, likewise, or None without a tail.
    """

    pages: Tensor
    tail: Tensor | None


def ada_logits_reference(
    query: Tensor,
    cache: PagedCache,
    *,
    logit_offset: Tensor | None = None,
    window: int = 0,
    query_positions: Tensor | None = None,
    position_term: PositionTerm | None = None,
) -> LogitResult:
    """The logits of every query head with every live token of its KV head, in float64.

    query: ``(n_sequences, n_q_heads, head_dim)`` in the frame, any floating dtype; query head i
    reads KV head ``i // group_size``.  logit_offset: ``(n_sequences, n_q_heads)``, added to every
    logit of that head (a post-RoPE key mean's q.mu).  window: 0 for full attention, else a token
    at position t is seen only if ``query_position - t < window``; it needs query_positions
    ``(n_sequences)`` and the cache's positions.  position_term: added to the logit of a token at
    its position (a pre-RoPE key mean's q.(R_t mu)); it needs the cache's positions.

    Raises:
        PageError: shapes that do not fit, or a window or position term without positions.
    """
    shape = (cache.n_sequences, cache.n_kv_heads, group_size_of(query, cache), cache.head_dim)
    check_window(cache, window, query_positions)
    grouped = query.to(torch.float64).reshape(shape)
    pages = page_logits(grouped, cache)
    tail: Tensor | None = None
    if cache.tail_keys is not None:
        tail = torch.einsum("shgd,shtd->shgt", grouped, cache.tail_keys.to(torch.float64))
    if logit_offset is not None:
        if logit_offset.shape != query.shape[:2]:
            raise PageError(
                f"logit_offset is {tuple(logit_offset.shape)}, expected {tuple(query.shape[:2])} "
                "(n_sequences, n_q_heads)"
            )
        offset = logit_offset.to(torch.float64).reshape(-1, grouped.shape[2])
        pages = pages + offset[cache.page_table.head_of_entry()][..., None]
        if tail is not None:
            tail = tail + offset.reshape(*grouped.shape[:3], 1)
    if position_term is not None:
        pages, tail = _with_position_term(position_term, query, cache, pages, tail)
    page_seen, tail_seen = _seen(cache, window, query_positions)
    pages = torch.where(page_seen[:, None, :], pages, -torch.inf)
    if tail is not None:
        assert tail_seen is not None
        # `where` rather than a product: dead tail rows may hold NaN.
        tail = torch.where(tail_seen[:, None, None, :], tail, -torch.inf)
        tail = tail.reshape(query.shape[0], query.shape[1], -1)
    return LogitResult(pages, tail)


def ada_decode_reference(
    query: Tensor,
    cache: PagedCache,
    softmax_scale: float,
    *,
    logit_offset: Tensor | None = None,
    logit_softcap: float = 0.0,
    window: int = 0,
    query_positions: Tensor | None = None,
    position_term: PositionTerm | None = None,
) -> DecodeResult:
    """One decode step over the cache, in float64.

    Arguments as `ada_logits_reference`; logit_softcap c > 0 replaces the scaled logit s by
    ``c tanh(s / c)`` (Gemma 2).  The log-sum-exp is that of the scaled, capped logits, offset
    and position term included.

    Raises:
        PageError: as `ada_logits_reference`; a softmax_scale or logit_softcap that is not finite,
            or a negative logit_softcap.
    """
    check_scale(softmax_scale, logit_softcap)
    logits = ada_logits_reference(
        query,
        cache,
        logit_offset=logit_offset,
        window=window,
        query_positions=query_positions,
        position_term=position_term,
    )
    return decode_from_logits(logits, cache, softmax_scale, logit_softcap=logit_softcap)


def decode_from_logits(
    logits: LogitResult, cache: PagedCache, softmax_scale: float, *, logit_softcap: float = 0.0
) -> DecodeResult:
    """The softmax and the value sum of `ada_decode_reference`, for logits already computed.

    Raises:
        PageError: a scale or soft-cap as there.
    """
    check_scale(softmax_scale, logit_softcap)
    n_sequences, group_size = cache.n_sequences, logits.pages.shape[1]
    head = cache.page_table.head_of_entry()
    scores = _scores(logits.pages, softmax_scale, logit_softcap)
    n_heads = n_sequences * cache.n_kv_heads
    peak = torch.full((n_heads, group_size), -torch.inf, dtype=torch.float64, device=cache.device)
    peak.scatter_reduce_(0, head[:, None].expand(-1, group_size), scores.amax(-1), "amax")
    tail_scores: Tensor | None = None
    if logits.tail is not None and logits.tail.shape[-1]:
        tail_scores = _scores(logits.tail, softmax_scale, logit_softcap)
        tail_scores = tail_scores.reshape(n_heads, group_size, -1)
        peak = torch.maximum(peak, tail_scores.amax(-1))
    finite_peak = torch.where(torch.isfinite(peak), peak, 0.0)  # no live token: all weights are 0

    weights = torch.exp(scores - finite_peak[head][..., None])
    total = torch.zeros_like(peak).index_add_(0, head, weights.sum(-1))
    output = page_values(weights, cache, n_heads)
    if tail_scores is not None:
        assert cache.tail_values is not None
        tail_weights = torch.exp(tail_scores - finite_peak[..., None])
        total = total + tail_weights.sum(-1)
        dead = torch.isneginf(tail_scores[:, :1]).transpose(1, 2)
        values = cache.tail_values.to(torch.float64).reshape(n_heads, -1, cache.head_dim)
        output = output + tail_weights @ torch.where(dead, 0.0, values)
    empty = total == 0
    output = output / torch.where(empty, 1.0, total)[..., None]
    log_sum_exp = finite_peak + torch.log(total)  # log 0 = -inf where no token is live
    return DecodeResult(
        output.reshape(n_sequences, -1, cache.head_dim),
        log_sum_exp.reshape(n_sequences, -1),
    )


def merge_partial(parts: list[DecodeResult]) -> DecodeResult:
    """Attention over the union of disjoint token sets from attention over each of them.

    ``lse = log sum_i exp(lse_i)``, ``output = sum_i exp(lse_i - lse) output_i``.
    """
    lse = torch.stack([part.log_sum_exp.to(torch.float64) for part in parts])
    total = torch.logsumexp(lse, dim=0)
    safe = torch.where(torch.isfinite(total), total, 0.0)
    weights = torch.exp(lse - safe)
    output = sum(
        weight[..., None] * part.output.to(torch.float64)
        for weight, part in zip(weights, parts, strict=True)
    )
    assert isinstance(output, Tensor)
    return DecodeResult(output, total)


def _with_position_term(
    term: PositionTerm, query: Tensor, cache: PagedCache, pages: Tensor, tail: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Page and tail logits with the term of every token added."""
    shape = (*term.coefficients.shape[:2], term.frequencies.shape[0])
    if shape != (*query.shape[:2], cache.n_kv_heads):
        raise PageError(
            f"position_term is for {shape[0]} sequences, {shape[1]} query and {shape[2]} KV heads, "
            f"expected {query.shape[0]}, {query.shape[1]} and {cache.n_kv_heads}"
        )
    check_position_term(cache)
    assert cache.positions is not None
    positions = cache.positions.to(torch.int64)
    pages = pages + term.logits(cache.page_table.head_of_entry(), positions)
    if tail is not None:
        heads = torch.arange(cache.n_sequences * cache.n_kv_heads, device=cache.device)
        of_head = _tail_positions(cache).repeat_interleave(cache.n_kv_heads, dim=0)
        tail = tail + term.logits(heads, of_head).reshape(tail.shape)
    return pages, tail


def _tail_positions(cache: PagedCache) -> Tensor:
    """``(n_sequences, tail_size)``."""
    assert cache.tail_positions is not None and cache.tail_keys is not None  # checked
    rows = torch.arange(cache.tail_keys.shape[2], device=cache.device)
    return cache.tail_positions.to(torch.int64)[:, None] + rows


def _scores(logits: Tensor, softmax_scale: float, logit_softcap: float) -> Tensor:
    scores = logits * softmax_scale
    if logit_softcap > 0.0:
        capped = logit_softcap * torch.tanh(scores / logit_softcap)
        # tanh(-inf) is finite: a masked token must stay masked.
        scores = torch.where(torch.isneginf(scores), scores, capped)
    return scores


def _seen(
    cache: PagedCache, window: int, query_positions: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Which rows take part: ``(n_entries, page_size)`` and ``(n_sequences, tail_size)`` bool."""
    device = cache.device
    rows = torch.arange(cache.page_size, device=device)
    pages = rows < cache.page_table.live_tokens[:, None]
    tail: Tensor | None = None
    if cache.tail_keys is not None and cache.tail_tokens is not None:
        tail_rows = torch.arange(cache.tail_keys.shape[2], device=device)
        tail = tail_rows < cache.tail_tokens[:, None]
    if window == 0:
        return pages, tail
    assert query_positions is not None and cache.positions is not None  # checked
    sequence = cache.page_table.head_of_entry() // cache.n_kv_heads
    now = query_positions.to(device=device, dtype=torch.int64)
    pages = pages & (now[sequence][:, None] - cache.positions.to(torch.int64) < window)
    if tail is not None:
        tail = tail & (now[:, None] - _tail_positions(cache) < window)
    return pages, tail
