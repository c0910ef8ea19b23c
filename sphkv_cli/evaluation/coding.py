"""The one interface between a method and the evaluated model: what queries read instead of k, v.

    (khat_t, vhat_t) = coding(layer, k_t, v_t, t),        t one coded token

Everything is in the model's own space, after RoPE and qk-norm: a method that codes centred and
rotated vectors turns them back here, which leaves every logit q . khat as it is in its frame.
Source: ours.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CodedTokens:
    """Tokens as a query reads them.

    keys, values: (n_tokens, n_kv_heads, head_dim).  kept: (n_tokens, n_kv_heads) bool, False where
    the token was dropped from that head's cache; None keeps all.  dense_keys: the same shape, True
    where the method itself left a key dense (its bytes are counted); None: nowhere.
    """

    keys: Tensor
    values: Tensor
    kept: Tensor | None = None
    dense_keys: Tensor | None = None


class KeyValueCoding(ABC):
    """A cache format at one setting, for every layer of one model."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What reports call it."""

    @property
    @abstractmethod
    def token_group(self) -> int:
        """Tokens that share stored statistics, counted from position 0; 1: each stands alone."""

    @abstractmethod
    def code(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> CodedTokens:
        """Code and decode tokens of one layer.

        Args:
            keys, values: (n_tokens, n_kv_heads, head_dim) float32 as attention receives them.
            positions: (n_tokens) int64, ascending; groups of `token_group` are whole or the last.
        """

    @abstractmethod
    def code_rate(self, n_tokens: int) -> float:
        """Bits per coordinate of n_tokens coded tokens, mean of keys and values, unpadded."""

    @abstractmethod
    def stored_bytes(self, n_tokens: int) -> int:
        """Bytes that n_tokens coded tokens take as laid out, all layers, page table included."""

    @abstractmethod
    def table_bytes(self) -> int:
        """Bytes of fixed tables (rotation, means, centroids), all layers, once per model."""


@dataclass(frozen=True)
class ModelCacheShape:
    """Layers, KV heads and coordinates: what turns rates into bytes."""

    n_layers: int
    n_kv_heads: int
    head_dim: int

    def n_coordinates(self, n_tokens: int) -> int:
        """Key and value coordinates of n_tokens."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * n_tokens

    def dense_bytes(self, n_tokens: int) -> int:
        """The same in 16 bits each."""
        return 2 * self.n_coordinates(n_tokens)


@dataclass(frozen=True)
class DenseCoding(KeyValueCoding):
    """What is read is what was written: the control, whose KL is rounding."""

    shape: ModelCacheShape

    @property
    def name(self) -> str:
        return "dense"

    @property
    def token_group(self) -> int:
        return 1

    def code(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> CodedTokens:
        return CodedTokens(keys, values)

    def code_rate(self, n_tokens: int) -> float:
        return 16.0

    def stored_bytes(self, n_tokens: int) -> int:
        return self.shape.dense_bytes(n_tokens)

    def table_bytes(self) -> int:
        return 0


def through_bfloat16(x: Tensor) -> Tensor:
    """x as a dense page keeps it."""
    return x.to(torch.bfloat16).to(x.dtype)
