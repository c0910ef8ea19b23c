"""Attention sinks kept dense: keys of small norm, found by a calibrated threshold per head.

    key t of head h stays dense  iff  ||k_t|| < factor * median_h ||k||        (`SinkRule`)

Each costs its dense bytes and a position.  Ours.
"""

from dataclasses import dataclass

from torch import Tensor

from sphkv_cli.allocation.layout import position_bytes
from sphkv_cli.evaluation.coding import CodedTokens, KeyValueCoding, through_bfloat16
from sphkv_codebooks.sink_rule import SinkRule


@dataclass(frozen=True, eq=False)
class SinksKeptDense(KeyValueCoding):
    """inner: codes the other keys; rule: finds the sinks.  The value of a sink stays coded."""

    inner: KeyValueCoding
    rule: SinkRule

    @property
    def name(self) -> str:
        # What `inner` says of its seed stays last, where rows of one code are joined by it.
        name, comma, seed = self.inner.name.partition(", seed ")
        return f"{name}, sinks < {self.rule.factor:g} dense{comma}{seed}"

    @property
    def token_group(self) -> int:
        return self.inner.token_group

    def code(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> CodedTokens:
        coded = self.inner.code(layer, keys, values, positions)
        is_sink = self.rule.finds(layer, keys)
        protected = coded.keys.clone()
        protected[is_sink] = through_bfloat16(keys[is_sink])
        return CodedTokens(protected, coded.values, coded.kept, is_sink)

    def code_rate(self, n_tokens: int) -> float:
        return self.inner.code_rate(n_tokens)

    def stored_bytes(self, n_tokens: int) -> int:
        return self.inner.stored_bytes(n_tokens)

    def table_bytes(self) -> int:
        return self.inner.table_bytes() + 4 * self.rule.median_norm.size


def dense_key_bytes(n_keys: int, head_dim: int, n_tokens: int) -> int:
    """Bytes of so many keys kept dense beside the codes of a document of n_tokens: 16 bits a
    coordinate, and a position."""
    return n_keys * (2 * head_dim + position_bytes(n_tokens))
