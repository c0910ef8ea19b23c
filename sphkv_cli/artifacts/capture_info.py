"""What a capture says of itself: model, layers, documents. Plain facts, validated when built."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["fit", "select", "judge"]
SPLITS: tuple[Split, ...] = ("fit", "select", "judge")
STORAGE_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class LayerInfo:
    """One layer's attention: `window` in tokens, itself included (0 = every token before it)."""

    layer_type: str
    window: int
    softmax_scale: float
    logit_softcap: float

    def __post_init__(self) -> None:
        if self.window < 0 or not self.softmax_scale > 0 or self.logit_softcap < 0:
            raise ValueError(f"not a layer: {self}")


@dataclass(frozen=True)
class DocumentInfo:
    """One captured document.

    `source` names the text it was cut from and `first_token` where in that text it starts;
    `text_sha256` is the SHA-256 of the source's UTF-8 text.
    """

    index: int
    name: str
    split: Split
    n_tokens: int
    n_queries: int
    source: str
    first_token: int
    text_sha256: str

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"document {self.name}: split {self.split!r} is not one of {SPLITS}")
        if not 1 <= self.n_queries <= self.n_tokens:
            raise ValueError(
                f"document {self.name}: {self.n_queries} queries of {self.n_tokens} tokens"
            )


@dataclass(frozen=True)
class CaptureInfo:
    """What holds for the whole capture; shapes are the same in every layer."""

    model: str
    architecture: str
    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    layers: tuple[LayerInfo, ...]
    model_digest: str
    rope: Mapping[str, Any]
    dtype: str
    stored_as: str
    has_keys_pre_rope: bool

    def __post_init__(self) -> None:
        if self.n_q_heads % self.n_kv_heads:
            raise ValueError(
                f"{self.n_q_heads} query heads do not share {self.n_kv_heads} KV heads"
            )
        if self.stored_as not in STORAGE_DTYPES:
            raise ValueError(f"stored_as {self.stored_as!r} is not one of {STORAGE_DTYPES}")

    @property
    def n_layers(self) -> int:
        """Number of attention layers."""
        return len(self.layers)

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.n_q_heads // self.n_kv_heads
