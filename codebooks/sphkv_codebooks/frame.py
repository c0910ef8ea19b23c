"""The frame of a model's cache: centring c_t, balancing A and rotation S, per (layer, KV head).

    stored key   k' = S A (k_t - c_t)     asked query  q' = S A^-T q
    q . k_t = q' . k' + q . c_t           value        v' = S v,  output o = S^T o'

so that every tier of a head (codes, int8, dense) shares one transformed query.  Centring, chosen
per layer:

    none       c_t = 0
    post_rope  c_t = mu       the mean key after RoPE: q . mu is the same for every key of the head
                              and cancels in softmax; a log-sum-exp or a logit adds it back
                              (`logit_offset`, before softmax_scale)
    pre_rope   c_t = R_t mu + nu
                              the mean key before RoPE, turned to the token's position, truncated to
                              a few RoPE pairs, and the mean nu after RoPE of what that leaves (slow
                              pairs hardly turn): q . (R_t mu) is added to each logit
                              (`position_coefficients`), exactly, because what is subtracted is the
                              same truncated mean; q . nu as above

Rotation: DRIVE (arXiv 2105.08339) and PolarQuant; balancing and centring: ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from sphkv_codebooks.density import FloatArray
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.rotary import kept_pairs, position_coefficients, rotate
from sphkv_codebooks.rotation import Rotation

Centring = Literal["none", "post_rope", "pre_rope"]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class FrameSet:
    """Frames of all layers and KV heads.

    centring: one for all layers, or one per layer.
    key_mean: (n_layers, n_kv_heads, head_dim) float32, 0 in layers without centring, truncated to
        the RoPE pairs that are kept in pre_rope layers; None where no layer is centred.
    balancing: (n_layers, n_kv_heads, head_dim, head_dim) invertible, or None (the identity).
    inv_freq: (n_layers, head_dim / 2) float32 radians per token of the model's RoPE (pairs
        (j, j + head_dim / 2)); needed where a layer is pre_rope.
    residual_mean: nu of the pre_rope layers, shaped as key_mean, 0 in the others; None where all
        are 0.
    """

    rotation: Rotation
    centring: Centring | tuple[Centring, ...] = "none"
    key_mean: Float32Array | None = None
    balancing: FloatArray | None = None
    inv_freq: Float32Array | None = None
    residual_mean: Float32Array | None = None
    _inverse_transposed: FloatArray | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        per_layer = (self.centring,) if isinstance(self.centring, str) else self.centring
        for centring in per_layer:
            if centring not in get_args(Centring):
                raise CodeError(f"centring must be one of {get_args(Centring)}, got {centring!r}")
        if (self.key_mean is not None) != any(centring != "none" for centring in per_layer):
            raise CodeError(
                f"centring {self.centring!r} and key_mean do not fit: post_rope and pre_rope need "
                "key means, none has none"
            )
        if self.key_mean is not None:
            self._accept_means(np.array(self.key_mean, dtype=np.float32))
        if self.balancing is not None:
            self._accept_balancing(np.array(self.balancing, dtype=np.float64))
        if self.inv_freq is not None:
            self._accept_inv_freq(np.array(self.inv_freq, dtype=np.float32))
        elif "pre_rope" in per_layer:
            raise CodeError("pre_rope centring needs inv_freq, the frequencies of the model's RoPE")
        if self.residual_mean is not None:
            self._accept_residual(np.array(self.residual_mean, dtype=np.float32))

    def _accept_means(self, mean: Float32Array) -> None:
        head_dim = self.head_dim
        if mean.ndim != 3 or mean.shape[-1] != head_dim or not np.isfinite(mean).all():
            raise CodeError(
                f"key_mean must be finite, (n_layers, n_kv_heads, {head_dim}); got {mean.shape}"
            )
        if not isinstance(self.centring, str):
            if len(self.centring) != mean.shape[0]:
                raise CodeError(
                    f"{len(self.centring)} centrings and key means of {mean.shape[0]} layers"
                )
            for layer, centring in enumerate(self.centring):
                if centring == "none" and mean[layer].any():
                    raise CodeError(f"layer {layer} is not centred, its key_mean must be 0")
        mean.setflags(write=False)
        object.__setattr__(self, "key_mean", mean)

    def _accept_balancing(self, balancing: FloatArray) -> None:
        head_dim = self.head_dim
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

    def _accept_inv_freq(self, inv_freq: Float32Array) -> None:
        half = self.head_dim // 2
        if inv_freq.ndim != 2 or inv_freq.shape[1] != half or not np.isfinite(inv_freq).all():
            raise CodeError(
                f"inv_freq must be finite, (n_layers, {half}): every RoPE pair of every layer "
                f"needs its frequency; got {inv_freq.shape}"
            )
        if self.key_mean is not None and self.key_mean.shape[0] != inv_freq.shape[0]:
            raise CodeError("key_mean and inv_freq are for different numbers of layers")
        inv_freq.setflags(write=False)
        object.__setattr__(self, "inv_freq", inv_freq)

    def _accept_residual(self, residual: Float32Array) -> None:
        shape = None if self.key_mean is None else self.key_mean.shape
        if residual.shape != shape or not np.isfinite(residual).all():
            raise CodeError(
                f"residual_mean must be finite, {shape} as key_mean; got {residual.shape}"
            )
        for layer in range(residual.shape[0]):
            if self.centring_of(layer) != "pre_rope" and residual[layer].any():
                raise CodeError(f"layer {layer} is not pre_rope, its residual_mean must be 0")
        residual.setflags(write=False)
        object.__setattr__(self, "residual_mean", residual)

    @property
    def head_dim(self) -> int:
        return self.rotation.head_dim

    def centring_of(self, layer: int) -> Centring:
        """The centring of one layer."""
        if isinstance(self.centring, str):
            return self.centring
        if not 0 <= layer < len(self.centring):
            raise CodeError(f"layer {layer} is out of range: the frames cover {len(self.centring)}")
        return self.centring[layer]

    def needs_positions(self, layer: int) -> bool:
        """Whether keys of this layer are coded relative to their position."""
        return self.centring_of(layer) == "pre_rope"

    def rope_pairs(self, layer: int) -> int:
        """The most RoPE pairs that a mean of this layer keeps; 0 unless it is pre_rope."""
        if not self.needs_positions(layer):
            return 0
        assert self.key_mean is not None
        return int(kept_pairs(self._row(self.key_mean, layer)).max())

    @property
    def centring_summary(self) -> str:
        """The centrings in words: "pre_rope", or "none in 2 layers, pre_rope in 22"."""
        if isinstance(self.centring, str):
            return self.centring
        counts = {kind: self.centring.count(kind) for kind in get_args(Centring)}
        found = [(kind, count) for kind, count in counts.items() if count]
        if len(found) == 1:
            return str(found[0][0])
        return ", ".join(f"{kind} in {count}" for kind, count in found) + " layers"

    def keys_to_frame(
        self, layer: int, keys: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """S A (k_t - c_t): keys (..., n_tokens, n_kv_heads, head_dim) -> same shape.

        positions: (n_tokens) int64, needed (and used) only where the layer is pre_rope.
        """
        centre = self._centre(layer, keys, positions)
        if centre is not None:
            keys = keys - centre
        if self.balancing is not None:
            keys = _per_head(self._layer(self.balancing, layer, keys), keys)
        return self.rotation.apply(keys)

    def keys_from_frame(
        self, layer: int, keys: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The inverse of keys_to_frame: A^-1 S^T k' + c_t."""
        keys = self.rotation.apply_inverse(keys)
        if self._inverse_transposed is not None:
            inverse = self._layer(self._inverse_transposed, layer, keys).transpose(-1, -2)
            keys = _per_head(inverse, keys)
        centre = self._centre(layer, keys, positions)
        return keys if centre is None else keys + centre

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
        """The part of q . c_t that no position changes: q . mu of a post_rope layer, q . nu of a
        pre_rope one, else 0; (..., n_q_heads) for untransformed queries (..., n_q_heads, head_dim).
        """
        constant = self.residual_mean if self.needs_positions(layer) else self.key_mean
        if constant is None:
            return torch.zeros(queries.shape[:-1], dtype=queries.dtype, device=queries.device)
        group_size = _group_size(queries, constant.shape[1])
        mean = self._layer(constant, layer, None).to(queries)
        return (queries * mean.repeat_interleave(group_size, dim=0)).sum(dim=-1)

    def position_coefficients(
        self, layer: int, queries: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """q . (R_t mu) of a pre_rope layer, as `rotary.position_coefficients` has it; else None.

        queries: (..., n_q_heads, head_dim), untransformed.
        """
        if not self.needs_positions(layer):
            return None
        assert self.key_mean is not None and self.inv_freq is not None
        _group_size(queries, self.key_mean.shape[1])
        mean = self._layer(self.key_mean, layer, None)
        inv_freq = self._layer(self.inv_freq, layer, None)
        return position_coefficients(mean, inv_freq, queries, self.rope_pairs(layer))

    def _centre(
        self, layer: int, keys: torch.Tensor, positions: torch.Tensor | None
    ) -> torch.Tensor | None:
        """c_t, broadcastable to keys; None where the layer is not centred."""
        centring = self.centring_of(layer)
        if self.key_mean is None or centring == "none":
            return None
        mean = self._layer(self.key_mean, layer, keys)
        if centring == "post_rope":
            return mean
        assert self.inv_freq is not None
        if positions is None or keys.ndim < 3 or tuple(positions.shape) != (keys.shape[-3],):
            found = None if positions is None else tuple(positions.shape)
            raise CodeError(
                f"layer {layer} is centred before RoPE: keys {tuple(keys.shape)} need the position "
                f"of every token, (n_tokens) int64; got {found}"
            )
        turned = rotate(mean[None], positions, self._layer(self.inv_freq, layer, None))
        if self.residual_mean is None:
            return turned
        return turned + self._layer(self.residual_mean, layer, keys)

    def _row(self, array: Float32Array, layer: int) -> Float32Array:
        if not 0 <= layer < array.shape[0]:
            raise CodeError(f"layer {layer} is out of range: the frames cover {array.shape[0]}")
        row: Float32Array = array[layer]
        return row

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
