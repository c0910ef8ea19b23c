"""int8 and int4 per token: one symmetric scale for a whole vector.

    s = max |x| / (2^(b-1) - 1) (fp16),   xhat = s round(x / s),   R = b + 16/d

Source: the usual symmetric quantiser per token (row-wise absmax: LLM.int8(), arXiv 2208.07339).
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
from sphkv_codebooks.errors import CodeError


@dataclass(frozen=True)
class IntegerPerToken(VectorQuantizer):
    """bits: 2 to 8, sign included."""

    bits: int

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise CodeError(f"integers per token have 2 to 8 bits, got {self.bits}")

    @property
    def name(self) -> str:
        return f"int{self.bits} per token"

    @property
    def source(self) -> str:
        return "row-wise absmax, LLM.int8(), arXiv 2208.07339"

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
        return self.bits + FP16_BITS / head_dim

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        check_vectors(x)
        largest_code = 2 ** (self.bits - 1) - 1
        scale = stored_in_fp16(x.abs().amax(-1, keepdim=True) / largest_code, "a vector's scale")
        codes = divide_or_zero(x, scale.expand_as(x)).round().clamp(-largest_code, largest_code)
        return scale * codes
