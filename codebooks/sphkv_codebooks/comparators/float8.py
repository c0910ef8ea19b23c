"""fp8 e4m3: each coordinate rounded to 4 exponent and 3 mantissa bits, at most 448.

    no scale:   xhat = fp8(clamp(x, -448, 448)),   R = 8
    per vector: s = max |x| / 448 (fp16),  xhat = s fp8(x / s),   R = 8 + 16/d

Source: FP8 formats for deep learning, arXiv 2209.05433. Saturating, as engines cast their caches.
"""

from __future__ import annotations

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

E4M3_MAX = 448.0


@dataclass(frozen=True)
class Float8(VectorQuantizer):
    """has_scale: whether each vector carries its own fp16 scale."""

    has_scale: bool

    @property
    def name(self) -> str:
        return "fp8 e4m3 per token" if self.has_scale else "fp8 e4m3, no scale"

    @property
    def source(self) -> str:
        return "FP8 formats for deep learning, arXiv 2209.05433"

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({"keys", "values"})

    @property
    def token_group(self) -> int:
        return 1

    @property
    def table_bytes(self) -> int:
        return 0

    def rate(self, head_dim: int, n_tokens: int) -> float:
        check_sizes(head_dim, n_tokens)
        return 8 + (FP16_BITS / head_dim if self.has_scale else 0.0)

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        check_vectors(x)
        if not self.has_scale:
            return _through_e4m3(x)
        scale = stored_in_fp16(x.abs().amax(-1, keepdim=True) / E4M3_MAX, "a vector's scale")
        return scale * _through_e4m3(divide_or_zero(x, scale.expand_as(x)))


def _through_e4m3(x: torch.Tensor) -> torch.Tensor:
    # Clamped here: torch's own cast gives 448 or NaN, by version and device.
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)
