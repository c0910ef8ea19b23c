"""The frame of a model's cache: centring c, balancing A and rotation S, per (layer, KV head).

    stored key   k' = S A (k - c)         asked query  q' = S A^-T q
    q . k = q' . k' + q . c               value        v' = S v,  output o = S^T o'

so that every tier of a head (codes, int8, dense) shares one transformed query. c is the mean of
post-RoPE keys: constant over positions, its logit term q . c is the same for every key of the head
and cancels in softmax; a log-sum-exp or a logit needs it added back (`logit_offset`, before
softmax_scale). Rotation: DRIVE (arXiv 2105.08339) and PolarQuant; balancing and centring: ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from sphkv_codebooks.density import FloatArray
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.rotation import Rotation

Centring = Literal["none", "post_rope", "pre_rope"]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class FrameSet:
    """Frames of all layers and KV heads.

    key_mean: (n_layers, n_kv_heads, head_dim) float32 or None; balancing: (n_layers, n_kv_heads,
    head_dim, head_dim) invertible or None (the identity).
    """

    rotation: Rotation
    centring: Centring = "none"
    key_mean: Float32Array | None = None
    balancing: FloatArray | None = None
    _inverse_transposed: FloatArray | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.centring not in get_args(Centring):
            raise CodeError(f"centring must be one of {get_args(Centring)}, got {self.centring!r}")
        if self.centring == "pre_rope":
            raise CodeError(
                "pre-RoPE centring is not available yet: use centring 'post_rope' or 'none'"
            )
        head_dim = self.rotation.head_dim
        if (self.key_mean is not None) != (self.centring == "post_rope"):
            raise CodeError(
                f"centring {self.centring!r} and key_mean do not fit: post_rope needs key means, "
                "none has none"
            )
        if self.key_mean is not None:
            mean = np.array(self.key_mean, dtype=np.float32)
            if mean.ndim != 3 or mean.shape[-1] != head_dim or not np.isfinite(mean).all():
                raise CodeError(
                    f"key_mean must be finite, (n_layers, n_kv_heads, {head_dim}); got {mean.shape}"
                )
            mean.setflags(write=False)
            object.__setattr__(self, "key_mean", mean)
        if self.balancing is not None:
            self._accept_balancing(np.array(self.balancing, dtype=np.float64), head_dim)

    def _accept_balancing(self, balancing: FloatArray, head_dim: int) -> None:
        if balancing.ndim != 4 or balancing.shape[2:] != (head_dim, head_dim):
            raise CodeError(
                f"balancing must be (n_layers, n_kv_heads, {head_dim}, {head_dim}), "
                f"got {balancing.shape}"
            )
        if self.key_mean is not None and self.key_mean.shape[:2] != balancing.shape[:2]:
            raise CodeError("key_mean and balancing are for different numbers of layers or heads")
        if not np.isfinite(balancing).all() or (np.linalg.cond(balancing) > 1e8).any():
            raise CodeError("every balancing matrix must be finite, with condition below 1e8")
        balancing.setflags(write=False)
        object.__setattr__(self, "balancing", balancing)
        inverse = np.linalg.inv(balancing).swapaxes(-1, -2)
        object.__setattr__(self, "_inverse_transposed", inverse)

    @property
    def head_dim(self) -> int:
        return self.rotation.head_dim

    def keys_to_frame(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """S A (k - c): keys (..., n_kv_heads, head_dim) -> same shape."""
        if self.key_mean is not None:
            keys = keys - self._mean(layer, keys)
        if self.balancing is not None:
            keys = _per_head(self._layer(self.balancing, layer, keys), keys)
        return self.rotation.apply(keys)

    def keys_from_frame(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """The inverse of keys_to_frame: A^-1 S^T k' + c."""
        keys = self.rotation.apply_inverse(keys)
        if self._inverse_transposed is not None:
            inverse = self._layer(self._inverse_transposed, layer, keys).transpose(-1, -2)
            keys = _per_head(inverse, keys)
        if self.key_mean is not None:
            keys = keys + self._mean(layer, keys)
        return keys

    def queries_to_frame(self, layer: int, queries: torch.Tensor) -> torch.Tensor:
        """S A^-T q: queries (..., n_q_heads, head_dim), same shape back.

        Query head h reads KV head h // group_size.
        """
        if self._inverse_transposed is not None:
            n_kv_heads = self._inverse_transposed.shape[1]
            group_size = _group_size(queries, n_kv_heads)
            matrices = self._layer(self._inverse_transposed, layer, None).to(queries)
            queries = _per_head(matrices.repeat_interleave(group_size, dim=0), queries)
        return self.rotation.apply(queries)

    def values_to_frame(self, values: torch.Tensor) -> torch.Tensor:
        """S v: values (..., head_dim)."""
        return self.rotation.apply(values)

    def output_from_frame(self, output: torch.Tensor) -> torch.Tensor:
        """S^T o': output (..., head_dim)."""
        return self.rotation.apply_inverse(output)

    def logit_offset(self, layer: int, queries: torch.Tensor) -> torch.Tensor:
        """q . c for untransformed queries (..., n_q_heads, head_dim) -> (..., n_q_heads)."""
        if self.key_mean is None:
            return torch.zeros(queries.shape[:-1], dtype=queries.dtype, device=queries.device)
        group_size = _group_size(queries, self.key_mean.shape[1])
        mean = self._layer(self.key_mean, layer, None).to(queries)
        return (queries * mean.repeat_interleave(group_size, dim=0)).sum(dim=-1)

    def _mean(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        assert self.key_mean is not None
        return self._layer(self.key_mean, layer, keys)

    def _layer(
        self, array: npt.NDArray[np.floating], layer: int, keys: torch.Tensor | None
    ) -> torch.Tensor:
        """One layer's (n_kv_heads, ...) slice, on the device and in the dtype of keys."""
        if not 0 <= layer < array.shape[0]:
            raise CodeError(f"layer {layer} is out of range: the frames cover {array.shape[0]}")
        tensor = torch.as_tensor(np.array(array[layer]))
        if keys is None:
            return tensor
        if keys.ndim < 2 or keys.shape[-2] != array.shape[1]:
            raise CodeError(
                f"keys {tuple(keys.shape)} must end in (n_kv_heads, head_dim) = "
                f"({array.shape[1]}, {self.head_dim})"
            )
        return tensor.to(keys)


def _per_head(matrices: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """matrices (n_heads, d, d) times vectors (..., n_heads, d)."""
    return torch.einsum("hij,...hj->...hi", matrices, vectors)


def _group_size(queries: torch.Tensor, n_kv_heads: int) -> int:
    n_q_heads = queries.shape[-2]
    if n_q_heads % n_kv_heads:
        raise CodeError(f"{n_q_heads} query heads cannot share {n_kv_heads} KV heads evenly")
    return n_q_heads // n_kv_heads
