"""The int8 tier: one fp16 scale per rotated vector.

``scale = fp16(max_i |x_i| / 127)`` rounded up, ``code_i = round(x_i / scale)``,
``xhat_i = scale * code_i``.  The rotation has made the coordinates of one vector alike, so that a
single scale serves them all; the rate is ``8 + 16 / head_dim`` bits per coordinate.  The error of
a coordinate is at most ``scale / 2``.  Source: ours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

INT8_LIMIT = 127


@dataclass(frozen=True)
class Int8Vectors:
    """codes ``(..., head_dim) int8`` and scales ``(...) float16``."""

    codes: Tensor
    scales: Tensor


def encode_int8(x: Tensor) -> Int8Vectors:
    """Quantise vectors ``(..., head_dim)``; ValueError on NaN, Inf or a scale above fp16."""
    x = x.to(torch.float64)
    if not bool(torch.isfinite(x).all()):
        raise ValueError("int8 tier: a vector holds NaN or Inf; check the captured activations")
    largest = x.abs().amax(dim=-1)
    exact = largest / INT8_LIMIT
    rounded = exact.to(torch.float16)
    # A scale rounded down would clip the largest coordinate by up to 2^-11 of itself.
    too_small = rounded.to(torch.float64) < exact
    scales = torch.where(too_small, _next_float16(rounded), rounded)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(
            f"int8 tier: a coordinate of {float(largest.max()):.4g} needs a scale above the fp16 "
            "range; keep this vector dense"
        )
    divisor = torch.where(scales > 0, scales, torch.ones_like(scales)).to(torch.float64)
    codes = torch.round(x / divisor[..., None]).clamp(-INT8_LIMIT, INT8_LIMIT).to(torch.int8)
    return Int8Vectors(codes, scales)


def decode_int8(vectors: Int8Vectors, dtype: torch.dtype = torch.float64) -> Tensor:
    """``xhat (..., head_dim)``."""
    return vectors.codes.to(dtype) * vectors.scales.to(dtype)[..., None]


def _next_float16(x: Tensor) -> Tensor:
    """The next larger float16 of a non-negative finite tensor."""
    return (x.view(torch.int16) + 1).view(torch.float16)
