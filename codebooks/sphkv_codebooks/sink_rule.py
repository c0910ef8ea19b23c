"""Attention sinks, found by the norm of their keys.

    token t of head h is a sink  iff  ||k_t|| < factor * median_h ||k||

The rule is ours: keys of small norm sit anywhere in a text, draw much of the softmax and lie far
from the mean that centring removes.  Kept dense they cost a few bytes and half of the damage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sphkv_codebooks.errors import CodeError

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class SinkRule:
    """median_norm: (n_layers, n_kv_heads) float32, of calibration keys after RoPE; factor: of it,
    0 finds none.  Raises CodeError on values that cannot be meant.
    """

    median_norm: Float32Array
    factor: float

    def __post_init__(self) -> None:
        median = np.array(self.median_norm, dtype=np.float32)
        if median.ndim != 2 or not np.isfinite(median).all() or (median < 0).any():
            raise CodeError(
                f"median_norm must be finite norms, (n_layers, n_kv_heads); got {median.shape}"
            )
        if not 0 <= self.factor < 1:
            raise CodeError(f"the sink factor is {self.factor}, it must be at least 0 and below 1")
        median.setflags(write=False)
        object.__setattr__(self, "median_norm", median)

    @property
    def thresholds(self) -> npt.NDArray[np.float64]:
        """The norm below which a key is a sink, (n_layers, n_kv_heads)."""
        thresholds: npt.NDArray[np.float64] = self.factor * self.median_norm.astype(np.float64)
        return thresholds

    def finds(self, layer: int, keys: Tensor) -> Tensor:
        """(..., n_kv_heads) bool, for keys (..., n_kv_heads, head_dim) as attention has them."""
        is_sink: Tensor = keys.norm(dim=-1) < torch.as_tensor(self.thresholds[layer]).to(keys)
        return is_sink
