"""A cache whose every (layer, KV head) may have books of its own: analytic, fitted, or online.

    khat = c_t + S^T Q_h(S (k - c_t)),   vhat = S^T Q'_h(S v)

Q_h is one code with the books of head h.  Online books are fitted to the very tokens that are
coded, once they are all there (prefill).  Source: frames and studies, ours; codes, PolarQuant,
arXiv 2502.02617 (its section 4 fits books offline and online).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_cli.evaluation.coding import CodedTokens, KeyValueCoding, ModelCacheShape
from sphkv_cli.evaluation.frame_coding import FrameCoding
from sphkv_cli.study.calibration import HeadCodes, online_codes
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.tier import TierFormat


class BookSource(ABC):
    """Where the books of a layer come from."""

    @property
    @abstractmethod
    def per_head(self) -> bool:
        """Whether every (layer, KV head, keys or values) has its own books: bytes."""

    @abstractmethod
    def codes(self, layer: int, keys: Tensor, values: Tensor) -> HeadCodes:
        """Codes per KV head for framed keys and values (n_tokens, n_kv_heads, head_dim)."""


@dataclass(frozen=True)
class AnalyticBooks(BookSource):
    """The books of the densities: the same for every head."""

    code: SphericalCode

    @property
    def per_head(self) -> bool:
        return False

    def codes(self, layer: int, keys: Tensor, values: Tensor) -> HeadCodes:
        same = [self.code] * keys.shape[1]
        return same, same


@dataclass(frozen=True)
class FittedBooks(BookSource):
    """Books fitted beforehand, per layer."""

    layers: Sequence[HeadCodes]

    @property
    def per_head(self) -> bool:
        return True

    def codes(self, layer: int, keys: Tensor, values: Tensor) -> HeadCodes:
        return self.layers[layer]


@dataclass(frozen=True)
class OnlineBooks(BookSource):
    """Books fitted to what is coded with them."""

    code: SphericalCode

    @property
    def per_head(self) -> bool:
        return True

    def codes(self, layer: int, keys: Tensor, values: Tensor) -> HeadCodes:
        return online_codes(self.code, keys, values)


@dataclass(frozen=True, eq=False)
class HeadCoding(KeyValueCoding):
    """label: its name in reports; code: the format, whose books `books` may replace."""

    label: str
    code_format: SphericalCode
    books: BookSource
    frames: FrameSet
    shape: ModelCacheShape

    @property
    def name(self) -> str:
        return self.label

    @property
    def token_group(self) -> int:
        return 1

    def code(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> CodedTokens:
        framed = self.frames.keys_to_frame(layer, keys, positions)
        framed_values = self.frames.values_to_frame(values)
        key_codes, value_codes = self.books.codes(layer, framed, framed_values)
        coded = self.frames.keys_from_frame(layer, through_heads(key_codes, framed), positions)
        coded_values = through_heads(value_codes, framed_values)
        return CodedTokens(coded, self.frames.output_from_frame(coded_values))

    def code_rate(self, n_tokens: int) -> float:
        return self.code_format.code_rate

    def stored_bytes(self, n_tokens: int) -> int:
        return self._uniform.stored_bytes(n_tokens)

    def table_bytes(self) -> int:
        once = 4 * sum(self.code_format.n_cells)
        n_books = 2 * self.shape.n_layers * self.shape.n_kv_heads if self.books.per_head else 1
        return self._uniform.table_bytes() + (n_books - 1) * once

    @property
    def _uniform(self) -> FrameCoding:
        """The same pages with one set of books."""
        tier = TierFormat.spherical(self.code_format, self.code_format)
        return FrameCoding(tier, self.frames, self.shape)


def through_heads(codes: Sequence[SphericalCode], vectors: Tensor) -> Tensor:
    """Framed vectors (n_tokens, n_kv_heads, head_dim) coded and decoded, each head by its code."""
    if all(code is codes[0] for code in codes):
        return codes[0].decode(codes[0].encode(vectors), vectors.dtype)
    heads = [
        code.decode(code.encode(vectors[:, head]), vectors.dtype) for head, code in enumerate(codes)
    ]
    return torch.stack(heads, dim=1)
