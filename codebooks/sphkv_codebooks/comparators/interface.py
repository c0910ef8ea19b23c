"""The one interface of the methods that are put beside the polar code.

A method is either a `VectorQuantizer`, which gives a vector back, or a `LogitEstimator`, which
gives only q . k. Both answer `logits(queries, keys)` and state everything they store per token:

    rate = stored bits / (n_tokens * head_dim)        (bits per coordinate)

Shapes: x, keys: (..., n_tokens, head_dim); queries: (..., n_queries, head_dim), before
softmax_scale; leading dimensions are batches of (sequence, KV head) and never share statistics.
Centring is the caller's: subtract the mean before, add it (or its logit) after.
Source: ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, Protocol

import torch

from sphkv_codebooks.errors import CodeError

FP16_BITS = 16
FP16_MAX = 65504.0

Role = Literal["keys", "values"]


class OrthogonalMap(Protocol):
    """What a method needs of a rotation S: S x and S^T x on the last axis."""

    def apply(self, x: torch.Tensor) -> torch.Tensor: ...

    def apply_inverse(self, x: torch.Tensor) -> torch.Tensor: ...


class Comparator(ABC):
    """A published method at one setting."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What reports call it, its setting included."""

    @property
    @abstractmethod
    def source(self) -> str:
        """The paper, or the public code, that defines it."""

    @property
    @abstractmethod
    def roles(self) -> frozenset[Role]:
        """What the method was made for: keys, values or both."""

    @property
    @abstractmethod
    def token_group(self) -> int:
        """Tokens that share stored statistics (scales, minima); 1: every token stands alone."""

    @property
    @abstractmethod
    def table_bytes(self) -> int:
        """Bytes kept once per (layer, KV head), whatever n_tokens; outside `rate`.

        Only what was fitted to data: rotations, projections and Lloyd-Max books follow from a seed.
        """

    @abstractmethod
    def rate(self, head_dim: int, n_tokens: int) -> float:
        """Stored bits per coordinate: codes, scales, norms, headers, the dense tail of n_tokens."""

    @abstractmethod
    def logits(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(..., n_queries, n_tokens): the method's q . k, queries exact, keys coded."""


class VectorQuantizer(Comparator):
    """A method that gives the vector back."""

    @abstractmethod
    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """x coded and decoded, same shape and dtype. x: (..., n_tokens, head_dim), floating."""

    def logits(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(..., n_queries, n_tokens): q . khat."""
        return queries @ self.reconstruct(keys).transpose(-1, -2)


class LogitEstimator(Comparator):
    """A method that keeps only enough of a key to estimate q . k."""


def check_vectors(x: torch.Tensor, head_dim: int | None = None) -> None:
    """Raises CodeError unless x is (..., n_tokens, head_dim) and floating, 32 bits or more."""
    if x.ndim < 2:
        raise CodeError(f"expected (..., n_tokens, head_dim), got shape {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise CodeError(f"comparators compute in float32 or float64, got {x.dtype}; convert first")
    if head_dim is not None and x.shape[-1] != head_dim:
        raise CodeError(f"this method was built for head_dim {head_dim}, got {x.shape[-1]}")


def check_sizes(head_dim: int, n_tokens: int, built_for: int | None = None) -> None:
    """Raises CodeError for a rate asked of no coordinates, or of another head_dim."""
    if head_dim < 1 or n_tokens < 1:
        raise CodeError(f"a rate needs tokens and coordinates, got {n_tokens} x {head_dim}")
    if built_for is not None and head_dim != built_for:
        raise CodeError(f"this method was built for head_dim {built_for}, got {head_dim}")


def stored_in_fp16(values: torch.Tensor, quantity: str) -> torch.Tensor:
    """values as fp16 gives them back, in their own dtype; an overflow is an error, never inf."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest > FP16_MAX:
        raise CodeError(
            f"{quantity} {largest:.4g} does not fit fp16 (65504 at most); scale the vectors down"
        )
    return values.to(torch.float16).to(values.dtype)


def divide_or_zero(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """numerator / denominator; 0 where the denominator is 0 (a zero vector, a constant channel)."""
    safe = torch.where(denominator == 0, torch.ones_like(denominator), denominator)
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / safe)
