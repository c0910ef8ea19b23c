"""`framing` by torch operations, on any device and in the dtype of the frame (float64 for tests).

Equations in `frame_tensors`.  Source: ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sphkv_kernels.frame_tensors import FramedQueries, FrameTensors, check_tokens
from sphkv_kernels.position_term import PositionTerm


def frame_tokens_reference(
    frame: FrameTensors,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    tail: Tensor,
    rows: Tensor,
    turns: tuple[Tensor, Tensor] | None = None,
    with_offset: bool = True,
) -> FramedQueries:
    """As `framing.frame_tokens`."""
    check_tokens(frame, query, key, value, tail, rows, turns)
    keys, values = key.to(frame.dtype), value.to(frame.dtype)
    if frame.centre is not None:
        keys = keys - frame.centre
    if frame.mean is not None and frame.turned is not None and turns is not None:
        keys = keys - turns[0] * frame.mean - turns[1] * frame.turned
    new = torch.stack([_by_heads(keys, frame.key), values @ frame.value])
    tail.view(-1, frame.head_dim).index_copy_(0, rows, new.to(tail.dtype).flatten(0, 2))
    return frame_queries(frame, query, with_offset=with_offset)


def frame_queries(frame: FrameTensors, query: Tensor, *, with_offset: bool = True) -> FramedQueries:
    """Queries (n, n_q_heads, d) of any dtype alone."""
    wide = query.to(frame.dtype)
    term = offset = None
    if frame.position is not None and frame.frequencies is not None:
        coefficients = torch.einsum("nhd,hdip->nhip", wide, frame.position).contiguous()
        term = PositionTerm(coefficients, frame.frequencies)
    if frame.offset is not None and with_offset:
        offset = (wide * frame.offset).sum(-1)
    return FramedQueries(_by_heads(wide, frame.query).contiguous(), term, offset)


def unframe_outputs_reference(frame: FrameTensors, outputs: Tensor, dtype: torch.dtype) -> Tensor:
    """As `framing.unframe_outputs`."""
    return (outputs @ frame.output).to(dtype)


def _by_heads(rows: Tensor, matrices: Tensor) -> Tensor:
    """(n, n_heads, d) times (n_heads or 1, d, d)."""
    if matrices.shape[0] == 1:
        return rows @ matrices[0]
    return torch.einsum("nhd,hde->nhe", rows, matrices)
