"""Wu et al.'s PolarQuant: each RoPE pair of a key as a radius and an angle, uniform per channel.

    r_j = hypot(k_j, k_(j+d/2)),   phi_j = atan2(k_(j+d/2), k_j) in [0, 2 pi)
    per pair j and group of g tokens, for r (n bits) and phi (m bits) alike:
        z = min,  s = (max - z) / 2^bits,  code = floor((v - z) / s),  vhat = z + s (code + 1/2)
    R = (n + m)/2 + 32/g:  4.25 bits at n = m = 4, g = 128; z and s in fp16

Post-RoPE keys only (values stay dense there); tokens that fill no group stay dense. It is not the
recursive polar code of arXiv 2502.02617, whose name it shares.
Source: PolarQuant (Wu et al., NeurIPS 2025), arXiv 2502.00527, sections 3.2 and 4.1 (groups of 128,
4 + 4 bits at 4.25, 3 + 3 at 3.25); the pairing (j, j + d/2) is its public code's, the paper prints
(2j, 2j + 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sphkv_codebooks.comparators.interface import (
    FP16_BITS,
    Role,
    VectorQuantizer,
    check_sizes,
    check_vectors,
    divide_or_zero,
    stored_in_fp16,
)
from sphkv_codebooks.comparators.token_groups import (
    join_groups,
    rate_with_dense_tail,
    split_full_groups,
)
from sphkv_codebooks.errors import CodeError


@dataclass(frozen=True)
class WuPolarQuant(VectorQuantizer):
    """radius_bits + angle_bits per pair of coordinates, statistics over group_size tokens."""

    radius_bits: int = 4
    angle_bits: int = 4
    group_size: int = 128

    def __post_init__(self) -> None:
        if not (1 <= self.radius_bits <= 8 and 1 <= self.angle_bits <= 8 and self.group_size >= 1):
            raise CodeError(
                "Wu et al.'s PolarQuant needs 1 to 8 bits for radius and angle and a group of 1 or "
                f"more tokens, got {self.radius_bits}, {self.angle_bits}, {self.group_size}"
            )

    @property
    def name(self) -> str:
        return f"PolarQuant (Wu et al.) r{self.radius_bits} t{self.angle_bits}"

    @property
    def source(self) -> str:
        return "PolarQuant (Wu et al.), arXiv 2502.00527"

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({"keys"})

    @property
    def token_group(self) -> int:
        return self.group_size

    @property
    def table_bytes(self) -> int:
        return 0

    def rate(self, head_dim: int, n_tokens: int) -> float:
        check_sizes(head_dim, n_tokens)
        _check_pairs(head_dim)
        per_group = 2 * 2 * FP16_BITS / 2 / self.group_size
        coded = (self.radius_bits + self.angle_bits) / 2 + per_group
        return rate_with_dense_tail(coded, self.group_size, n_tokens)

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        check_vectors(x)
        _check_pairs(x.shape[-1])
        groups, tail = split_full_groups(x, self.group_size)
        first, second = groups.chunk(2, dim=-1)
        angle = torch.atan2(second, first)
        angle = torch.where(angle < 0, angle + 2 * math.pi, angle)
        angle = _cell_middles(angle, self.angle_bits)
        radius = _cell_middles(torch.hypot(first, second), self.radius_bits)
        coded = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)
        return join_groups(coded, tail)


def _cell_middles(v: torch.Tensor, bits: int) -> torch.Tensor:
    """v coded over the tokens of its group (axis -2) and decoded to the middle of its cell."""
    if v.numel() == 0:
        return v
    n_cells = 2**bits
    zero = stored_in_fp16(v.amin(-2, keepdim=True), "a group's minimum")
    scale = stored_in_fp16((v.amax(-2, keepdim=True) - zero) / n_cells, "a group's scale")
    codes = divide_or_zero(v - zero, scale.expand_as(v)).floor().clamp(0, n_cells - 1)
    return zero + scale * (codes + 0.5)


def _check_pairs(head_dim: int) -> None:
    if head_dim % 2:
        raise CodeError(f"RoPE pairs need an even head_dim, got {head_dim}")
