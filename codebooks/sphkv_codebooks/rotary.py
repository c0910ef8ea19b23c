"""Rotary position embedding as a rotation that can be undone: R_t, its means, and q . (R_t mu).

    R_t turns the pair (x_j, x_{j + d/2}) by t inv_freq_j          (rotate-half, arXiv 2104.09864)
    mu = E[R_t^-1 k_t]                                             the mean key before RoPE
    q . (R_t mu) = sum_j cos(t f_j) (q_j mu_j + q_j' mu_j') + sin(t f_j) (q_j' mu_j - q_j mu_j')

with j' = j + d/2.  Keys are those after RoPE, so a factor on cos and sin (YaRN's attention scaling)
is inside mu.  The mean rotated to each position as a code's centre: ours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Float32Array = npt.NDArray[np.float32]


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """R_t x for x (..., n_tokens or 1, n_heads, head_dim) and positions (n_tokens).

    Angles are made in float64 whatever the dtype of x; inv_freq: (head_dim / 2) radians per token.
    """
    angles = positions.to("cpu", torch.float64)[:, None] * inv_freq.to("cpu", torch.float64)
    cos = angles.cos().to(x.dtype).to(x.device)[:, None]
    sin = angles.sin().to(x.dtype).to(x.device)[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def keep_strongest_pairs(
    mean: Float32Array, n_pairs: int, weight: npt.NDArray[np.float64] | None = None
) -> Float32Array:
    """The means (..., head_dim) with all but their n_pairs strongest RoPE pairs set to 0.

    A pair is as strong as its squared norm, times its weight (..., head_dim / 2) if given.
    """
    first, second = np.split(mean.astype(np.float64), 2, axis=-1)
    strength = (first**2 + second**2) * (1.0 if weight is None else weight)
    # Stable, so that ties fall to the lower pair.
    rank = np.argsort(np.argsort(-strength, axis=-1, kind="stable"), axis=-1, kind="stable")
    kept = np.concatenate([rank < n_pairs] * 2, axis=-1)
    return np.where(kept, mean, np.float32(0)).astype(np.float32)


def turning(inv_freq: Float32Array, n_positions: int) -> npt.NDArray[np.float64]:
    """1 - |mean over t < n_positions of exp(i t f)|^2 of each frequency: 0 for a pair that stands
    still, so that a constant replaces its turned mean, 1 for one that goes round."""
    half_angle = inv_freq.astype(np.float64) / 2
    # The geometric sum: sin(n x) / (n sin x), 1 at x = 0.
    sine = np.sin(half_angle)
    still = np.ones_like(half_angle)
    moving = sine != 0
    still[moving] = np.sin(n_positions * half_angle[moving]) / (n_positions * sine[moving])
    turns: npt.NDArray[np.float64] = 1.0 - still**2
    return turns


def kept_pairs(mean: Float32Array) -> npt.NDArray[np.int64]:
    """How many RoPE pairs of each mean (..., head_dim) are not 0: (...)."""
    first, second = np.split(mean, 2, axis=-1)
    n_kept: npt.NDArray[np.int64] = ((first != 0) | (second != 0)).sum(axis=-1)
    return n_kept


def position_coefficients(
    mean: Tensor, inv_freq: Tensor, queries: Tensor, n_pairs: int
) -> tuple[Tensor, Tensor]:
    """q . (R_t mu) as a trigonometric sum over the kept pairs of each KV head.

    Args:
        mean: (n_kv_heads, head_dim) with at most n_pairs pairs that are not 0.
        inv_freq: (head_dim / 2).
        queries: (..., n_q_heads, head_dim), untransformed; head h reads KV head h // group_size.
        n_pairs: columns of the result.

    Returns:
        coefficients (..., n_q_heads, 2, n_pairs) of cos and of sin, in the queries' dtype;
        frequencies (n_kv_heads, n_pairs) float32, radians per token.
    """
    half = mean.shape[-1] // 2
    group_size = queries.shape[-2] // mean.shape[0]
    first, second = mean.chunk(2, dim=-1)
    is_kept = (first != 0) | (second != 0)
    pairs = is_kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :n_pairs]
    pairs = pairs.sort(dim=-1).values
    of_query = pairs.repeat_interleave(group_size, dim=0)
    shape = (*queries.shape[:-1], n_pairs)
    columns = of_query.to(queries.device).expand(shape)
    q1 = queries[..., :half].gather(-1, columns)
    q2 = queries[..., half:].gather(-1, columns)
    mu1, mu2 = (
        part.gather(-1, pairs).to(queries).repeat_interleave(group_size, dim=0)
        for part in (first, second)
    )
    coefficients = torch.stack([q1 * mu1 + q2 * mu2, q2 * mu1 - q1 * mu2], dim=-2)
    frequencies = inv_freq.to(torch.float32)[pairs]
    return coefficients, frequencies.to(queries.device)
