"""A published method as a cache: its quantiser of keys and its quantiser of values.

Keys may be centred first, as the frames of the codebooks centre them: khat = c_t + Q(k - c_t).  The
methods' sources are theirs (`sphkv_codebooks.comparators`); centring them is ours, and named.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from sphkv_cli.allocation.layout import fixed_table_bytes
from sphkv_cli.errors import UsageError
from sphkv_cli.evaluation.coding import CodedTokens, KeyValueCoding, ModelCacheShape
from sphkv_codebooks.comparators.interface import VectorQuantizer
from sphkv_codebooks.frame import FrameSet


@dataclass(frozen=True, eq=False)
class ComparatorCoding(KeyValueCoding):
    """keys, values: what quantises them; centring: frames that only centre, or None."""

    method: str
    keys: VectorQuantizer
    values: VectorQuantizer
    shape: ModelCacheShape
    centring: FrameSet | None = None

    def __post_init__(self) -> None:
        if self.values.token_group != 1:
            raise UsageError(
                f"{self.values.name} codes values in groups of tokens", "choose another method"
            )

    @property
    def name(self) -> str:
        return self.method

    @property
    def token_group(self) -> int:
        return self.keys.token_group

    def code(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> CodedTokens:
        # Quantisers take (..., n_tokens, head_dim): heads lead.
        if self.centring is not None:
            keys = self.centring.keys_to_frame(layer, keys, positions)
        coded = self.keys.reconstruct(keys.transpose(0, 1)).transpose(0, 1)
        if self.centring is not None:
            coded = self.centring.keys_from_frame(layer, coded, positions)
        coded_values = self.values.reconstruct(values.transpose(0, 1))
        return CodedTokens(coded, coded_values.transpose(0, 1))

    def code_rate(self, n_tokens: int) -> float:
        # A group that is not full counts in the laid-out rate: its tokens lie dense.
        whole = max(n_tokens // self.token_group, 1) * self.token_group
        head_dim = self.shape.head_dim
        return (self.keys.rate(head_dim, whole) + self.values.rate(head_dim, whole)) / 2

    def stored_bytes(self, n_tokens: int) -> int:
        if n_tokens < 1:
            return 0
        head_dim, heads = self.shape.head_dim, self.shape.n_layers * self.shape.n_kv_heads
        bits = self.keys.rate(head_dim, n_tokens) + self.values.rate(head_dim, n_tokens)
        return heads * math.ceil(bits * head_dim * n_tokens / 8)

    def table_bytes(self) -> int:
        heads = self.shape.n_layers * self.shape.n_kv_heads
        fitted = heads * (self.keys.table_bytes + self.values.table_bytes)
        return fitted + (0 if self.centring is None else fixed_table_bytes(self.centring, []))
