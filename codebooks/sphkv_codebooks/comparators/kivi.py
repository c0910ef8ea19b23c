"""KIVI: uniform codes between minimum and maximum, keys per channel, values per token.

    keys:   one (zero, scale) per channel over 32 consecutive tokens; the rest stays dense
    values: one (zero, scale) per token over 32 consecutive channels
    R = b + 32/g:  3 bits at b = 2, 5 bits at b = 4, g = 32; zero and scale in fp16

Keys need statistics over groups of tokens: a new token waits until its group is full.
Source: KIVI, arXiv 2402.02750, section 3. There the residual holds up to 128 tokens and the newest
values stay dense as well: `residual_length`. A dense window for every method alike is the caller's.
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
)
from sphkv_codebooks.comparators.min_max import reconstruct_min_max
from sphkv_codebooks.comparators.token_groups import (
    DENSE_BITS,
    cut_axis,
    join_groups,
    rate_with_dense_tail,
    split_full_groups,
)
from sphkv_codebooks.errors import CodeError

_SOURCE = "KIVI, arXiv 2402.02750"


@dataclass(frozen=True)
class KiviKeys(VectorQuantizer):
    """residual_length: a multiple of group_size; only whole runs of it are coded."""

    bits: int
    group_size: int = 32
    residual_length: int = 32

    def __post_init__(self) -> None:
        _check(self.bits, self.group_size)
        if self.residual_length < 1 or self.residual_length % self.group_size:
            raise CodeError(
                f"KIVI's residual_length is a multiple of the group size {self.group_size}, "
                f"got {self.residual_length}"
            )

    @property
    def name(self) -> str:
        return f"KIVI-{self.bits} keys"

    @property
    def source(self) -> str:
        return _SOURCE

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
        coded = self.bits + 2 * FP16_BITS / self.group_size
        return rate_with_dense_tail(coded, self.residual_length, n_tokens)

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        check_vectors(x)
        runs, tail = split_full_groups(x, self.residual_length)
        groups = cut_axis(runs, -2, self.group_size)
        coded = reconstruct_min_max(groups, self.bits, dim=-2)
        return join_groups(coded.flatten(-3, -2), tail)


@dataclass(frozen=True)
class KiviValues(VectorQuantizer):
    """residual_length: the newest tokens that stay dense, 0 by default."""

    bits: int
    group_size: int = 32
    residual_length: int = 0

    def __post_init__(self) -> None:
        _check(self.bits, self.group_size)
        if self.residual_length < 0:
            raise CodeError(f"residual_length is 0 or more tokens, got {self.residual_length}")

    @property
    def name(self) -> str:
        return f"KIVI-{self.bits} values"

    @property
    def source(self) -> str:
        return _SOURCE

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({"values"})

    @property
    def token_group(self) -> int:
        return 1

    @property
    def table_bytes(self) -> int:
        return 0

    def rate(self, head_dim: int, n_tokens: int) -> float:
        check_sizes(head_dim, n_tokens)
        self._check_head_dim(head_dim)
        n_dense = min(self.residual_length, n_tokens)
        coded = self.bits + 2 * FP16_BITS / self.group_size
        return (coded * (n_tokens - n_dense) + DENSE_BITS * n_dense) / n_tokens

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        check_vectors(x)
        self._check_head_dim(x.shape[-1])
        n_coded = max(x.shape[-2] - self.residual_length, 0)
        groups = cut_axis(x[..., :n_coded, :], -1, self.group_size)
        coded = reconstruct_min_max(groups, self.bits, dim=-1).flatten(-2, -1)
        return torch.cat([coded, x[..., n_coded:, :]], dim=-2)

    def _check_head_dim(self, head_dim: int) -> None:
        if head_dim % self.group_size:
            raise CodeError(
                f"KIVI codes values in groups of {self.group_size} channels, "
                f"which do not divide head_dim {head_dim}"
            )


def _check(bits: int, group_size: int) -> None:
    if not 1 <= bits <= 8 or group_size < 1:
        raise CodeError(
            "KIVI needs 1 to 8 bits and a group of 1 or more, "
            f"got {bits} bits, groups of {group_size}"
        )
