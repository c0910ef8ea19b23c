"""The first and last tokens of a context kept dense beside a code of all between them.

    (khat_t, vhat_t) = bf16(k_t, v_t)   t < first or t >= n - last,   inner's elsewhere

Their bytes are counted.  What is kept so is what published codes' own evaluations often keep;
sinks at the start and recent tokens carry much of a uniform code's loss.  Source: common practice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_cli.errors import UsageError
from sphkv_cli.evaluation.coding import (
    CodedTokens,
    KeyValueCoding,
    ModelCacheShape,
    through_bfloat16,
)


@dataclass(frozen=True, eq=False)
class EndsKeptDense(KeyValueCoding):
    """inner: codes what lies between; first, last: tokens of a whole context, not of a part."""

    inner: KeyValueCoding
    shape: ModelCacheShape
    first: int
    last: int

    def __post_init__(self) -> None:
        if self.first < 0 or self.last < 0:
            raise UsageError(
                f"{self.first} first and {self.last} last tokens", "give 0 or more of each"
            )

    @property
    def name(self) -> str:
        # What `inner` says of its seed stays last, where rows of one code are joined by it.
        name, comma, seed = self.inner.name.partition(", seed ")
        return f"{name}, ends {self.first}+{self.last} dense{comma}{seed}"

    @property
    def token_group(self) -> int:
        return self.inner.token_group

    def code(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> CodedTokens:
        between = slice(self.first, max(len(keys) - self.last, self.first))
        n_between = len(positions[between])
        read_keys, read_values = through_bfloat16(keys), through_bfloat16(values)
        if not n_between:
            return CodedTokens(read_keys, read_values)
        coded = self.inner.code(layer, keys[between], values[between], positions[between])
        read_keys[between], read_values[between] = coded.keys, coded.values
        return CodedTokens(
            read_keys,
            read_values,
            _widened(coded.kept, between, len(keys), True),
            _widened(coded.dense_keys, between, len(keys), False),
        )

    def code_rate(self, n_tokens: int) -> float:
        return self.inner.code_rate(self._n_between(n_tokens))

    def stored_bytes(self, n_tokens: int) -> int:
        n_between = self._n_between(n_tokens)
        return self.inner.stored_bytes(n_between) + self.shape.dense_bytes(n_tokens - n_between)

    def table_bytes(self) -> int:
        return self.inner.table_bytes()

    def _n_between(self, n_tokens: int) -> int:
        return max(n_tokens - self.first - self.last, 0)


def _widened(flags: Tensor | None, between: slice, n_tokens: int, rest: bool) -> Tensor | None:
    """(n_between, n_kv_heads) bool for all tokens, `rest` at the ends."""
    if flags is None:
        return None
    wide = torch.full((n_tokens, flags.shape[1]), rest, device=flags.device)
    wide[between] = flags
    return wide
