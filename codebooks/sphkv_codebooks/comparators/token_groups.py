"""Runs of consecutive tokens that share stored statistics, and the tail that fills no run.

A method with statistics per channel over groups of g tokens can code floor(n/g) g tokens; the rest
waits in 16 bits until its group is full.
Shapes: (..., n_tokens, head_dim) <-> (..., n_groups, g, head_dim).
Source: KIVI, arXiv 2402.02750, section 3.3 (grouped part and residual part).
"""

from __future__ import annotations

import torch

DENSE_BITS = 16


def cut_axis(x: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """Axis `dim` (negative) cut into pieces of `length`, which must divide it: one axis more."""
    shape = list(x.shape)
    shape[dim : dim + 1 or None] = [shape[dim] // length, length]
    return x.reshape(shape)


def split_full_groups(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Full groups (..., n_groups, group_size, head_dim) and the tail (..., n_rest, head_dim)."""
    n_full = x.shape[-2] // group_size * group_size
    head, tail = x[..., :n_full, :], x[..., n_full:, :]
    return cut_axis(head, -2, group_size), tail


def join_groups(groups: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
    """The inverse of split_full_groups."""
    return torch.cat([groups.flatten(-3, -2), tail], dim=-2)


def rate_with_dense_tail(coded_rate: float, group_size: int, n_tokens: int) -> float:
    """Bits per coordinate when only full groups are coded and the tail stays in 16 bits."""
    n_tail = n_tokens % group_size
    return (coded_rate * (n_tokens - n_tail) + DENSE_BITS * n_tail) / n_tokens
