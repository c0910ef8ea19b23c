"""Attention sinks kept dense: keys of small norm, found by a calibrated threshold per head.

    key t of head h stays dense  iff  ||k_t|| < factor * median_h ||k||

The rule is ours, tried on small models: such keys sit anywhere in a text, draw much of the softmax
and lie far from the mean that centring removes.  Each costs its dense bytes and a position.
"""

from dataclasses import dataclass

from torch import Tensor

from sphkv_cli.allocation.layout import position_bytes
from sphkv_cli.evaluation.coding import CodedTokens, KeyValueCoding, through_bfloat16


@dataclass(frozen=True, eq=False)
class SinksKeptDense(KeyValueCoding):
    """inner: codes the other keys.  median_norm: (n_layers, n_kv_heads) of calibration keys.

    factor: of the median; 0 protects nothing.  The value of a sink stays coded.
    """

    inner: KeyValueCoding
    median_norm: Tensor
    factor: float = 0.6

    @property
    def name(self) -> str:
        return f"{self.inner.name}, sinks dense"

    @property
    def token_group(self) -> int:
        return self.inner.token_group

    def code(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> CodedTokens:
        coded = self.inner.code(layer, keys, values, positions)
        threshold = self.factor * self.median_norm[layer].to(keys)
        is_sink = keys.norm(dim=-1) < threshold
        protected = coded.keys.clone()
        protected[is_sink] = through_bfloat16(keys[is_sink])
        return CodedTokens(protected, coded.values, coded.kept, is_sink)

    def code_rate(self, n_tokens: int) -> float:
        return self.inner.code_rate(n_tokens)

    def stored_bytes(self, n_tokens: int) -> int:
        return self.inner.stored_bytes(n_tokens)

    def table_bytes(self) -> int:
        return self.inner.table_bytes() + 4 * self.median_norm.numel()


def dense_key_bytes(n_keys: int, head_dim: int, n_tokens: int) -> int:
    """Bytes of so many keys kept dense beside the codes of a document of n_tokens: 16 bits a
    coordinate, and a position."""
    return n_keys * (2 * head_dim + position_bytes(n_tokens))
