"""Uniform quantisation between the smallest and the largest value of a group.

    z = min x,  s = (max x - z) / (2^b - 1),  xhat = z + s round((x - z) / s)

z and s are kept in fp16, the codes are made from them as kept. A constant group: s = 0, xhat = z.
Source: KIVI, arXiv 2402.02750, equation 1 ("asymmetric", round to nearest).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sphkv_codebooks.comparators.interface import divide_or_zero, stored_in_fp16


@dataclass(frozen=True)
class MinMaxCodes:
    """codes: the shape of x, uint8, one byte each; zero, scale: 1 along the coded axis, as kept."""

    codes: torch.Tensor
    zero: torch.Tensor
    scale: torch.Tensor

    def decode(self) -> torch.Tensor:
        """xhat, in the dtype of zero and scale."""
        return self.zero + self.scale * self.codes.to(self.scale.dtype)


def encode_min_max(x: torch.Tensor, bits: int, dim: int) -> MinMaxCodes:
    """x, not empty, coded along `dim`: one zero and one scale for all of it; bits: 1 to 8."""
    n_steps = 2**bits - 1
    zero = stored_in_fp16(x.amin(dim, keepdim=True), "a group's minimum")
    scale = stored_in_fp16((x.amax(dim, keepdim=True) - zero) / n_steps, "a group's scale")
    codes = divide_or_zero(x - zero, scale.expand_as(x)).round().clamp(0, n_steps)
    return MinMaxCodes(codes.to(torch.uint8), zero, scale)


def reconstruct_min_max(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """x coded along `dim` and decoded; same shape."""
    return encode_min_max(x, bits, dim).decode() if x.numel() else x
