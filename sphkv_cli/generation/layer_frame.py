"""A layer's frame as matrices on the model's device, for what every step turns.

    q' = q M_h   offset = q . c_h   (a, b) = q W_h   all linear in q
    k' = (k - c_h - R_t mu_h) K_h   v' = v S   o = o' S^T

read off `FrameSet` by sending it the identity, so that there is one definition of a frame.
Source: ours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_codebooks.frame import FrameSet
from sphkv_kernels.frame_tensors import FramedQueries, FrameTensors
from sphkv_kernels.framing import frame_tokens, prepare_framing, unframe_outputs
from sphkv_kernels.framing_reference import (
    frame_queries,
    frame_tokens_reference,
    unframe_outputs_reference,
)


@dataclass(frozen=True, eq=False)
class Turning:
    """How a mean turns, R_t mu = cos(w t) mu + sin(w t) nu: frequencies (d) float64, w of every
    coordinate's pair, and their bytes, which tell layers that turn alike."""

    frequencies: Tensor
    digest: bytes

    @staticmethod
    def of(inv_freq: Tensor) -> "Turning":
        """inv_freq (d / 2): radians per token, on the device to be on."""
        frequencies = inv_freq.double().repeat(2)
        return Turning(frequencies, frequencies.cpu().numpy().tobytes())


class Turns:
    """cos(w t), sin(w t) of n tokens at positions (n), made once for all layers that turn alike."""

    def __init__(self, positions: Tensor) -> None:
        self._positions = positions
        self._made: dict[tuple[bytes, torch.dtype], tuple[Tensor, Tensor]] = {}

    def of(self, turning: Turning, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Each (n, 1, d); angles in float64, as `rotary.rotate` makes them."""
        key = turning.digest, dtype
        if key not in self._made:
            angles = self._positions[:, None, None] * turning.frequencies
            self._made[key] = angles.cos().to(dtype), angles.sin().to(dtype)
        return self._made[key]


@dataclass(frozen=True, eq=False)
class LayerFrame:
    """tensors: the matrices; turning: of what is centred before RoPE, or None.

    uses_kernel: whether the CUDA kernel multiplies in steps, else torch operations.
    """

    tensors: FrameTensors
    turning: Turning | None
    uses_kernel: bool

    @staticmethod
    def of(
        frames: FrameSet,
        layer: int,
        n_q_heads: int,
        n_kv_heads: int,
        device: torch.device,
        *,
        uses_kernel: bool,
    ) -> "LayerFrame":
        """One layer's matrices: float32 for the kernel, else float64."""
        d, dtype = frames.head_dim, torch.float32 if uses_kernel else torch.float64
        eye = torch.eye(d, dtype=torch.float64)
        per_head = eye[:, None].expand(d, n_q_heads, d)
        query = frames.queries_to_frame(layer, per_head).transpose(0, 1)
        # Centring at one place drops out of the difference.
        there = torch.zeros(d, dtype=torch.int64)
        keys = eye[:, None].expand(d, n_kv_heads, d)
        key = frames.keys_to_frame(layer, keys, there)
        key = (key - frames.keys_to_frame(layer, 0 * keys, there)).transpose(0, 1)
        if frames.balancing is None:
            query, key = query[:1], key[:1]
        constant = frames.logit_offset(layer, per_head)
        # After RoPE, or what a truncated mean before RoPE leaves.
        offset = constant.T if bool(constant.any()) else None
        term = frames.position_coefficients(layer, per_head)

        def moved(x: Tensor) -> Tensor:
            return x.to(device, dtype).contiguous()

        def moved_if_any(x: Tensor | None) -> Tensor | None:
            return None if x is None else moved(x)

        centre, mean, inv_freq = _centring(frames, layer)
        tensors = FrameTensors(
            moved(query),
            moved(key),
            moved(frames.values_to_frame(eye)),
            moved(frames.output_from_frame(eye)),
            n_q_heads,
            n_kv_heads,
            centre=moved_if_any(centre),
            mean=moved_if_any(mean),
            turned=moved_if_any(None if mean is None else _quarter_turned(mean)),
            position=moved_if_any(None if term is None else term[0].transpose(0, 1)),
            frequencies=None if term is None else term[1].to(device, torch.float32).contiguous(),
            offset=moved_if_any(offset),
        )
        turning = None if inv_freq is None else Turning.of(inv_freq.to(device))
        return LayerFrame(tensors, turning, uses_kernel)

    def prepare(self, n_sequences: int) -> None:
        """Load what steps of so many sequences launch.

        Raises:
            PageError: the kernel does not have this head_dim.
            KernelBuildError, KernelLaunchError: it cannot be built or loaded here.
        """
        if self.uses_kernel:
            prepare_framing(self.tensors, n_sequences)

    def enter(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        tail: Tensor,
        rows: Tensor,
        turns: Turns,
        with_offset: bool,
    ) -> FramedQueries:
        """One token of every sequence: its queries into the frame, keys and values into the tail.

        Args:
            query: (n, n_q_heads, d); key, value: (n, n_kv_heads, d).
            tail: (..., d) bfloat16; rows: (2 n n_kv_heads) int64 in it, keys before values.
            turns: at the tokens' positions.
            with_offset: whether what all logits of a head get is asked for.
        """
        take = frame_tokens if self.uses_kernel else frame_tokens_reference
        turned = None if self.turning is None else turns.of(self.turning, self.tensors.dtype)
        return take(
            self.tensors,
            query,
            key,
            value,
            tail=tail,
            rows=rows,
            turns=turned,
            with_offset=with_offset,
        )

    def leave(self, outputs: Tensor, dtype: torch.dtype) -> Tensor:
        """(n, n_q_heads, d) out of the frame, in another dtype."""
        take = unframe_outputs if self.uses_kernel else unframe_outputs_reference
        return take(self.tensors, outputs, dtype)

    def queries(self, queries: Tensor) -> FramedQueries:
        """(n, n_q_heads, d) of any dtype, any number of them, by torch operations."""
        return frame_queries(self.tensors, queries)

    def outputs(self, outputs: Tensor) -> Tensor:
        """(n, n_q_heads, d) out of the frame, likewise."""
        return unframe_outputs_reference(self.tensors, outputs, self.tensors.dtype)

    @property
    def device(self) -> torch.device:
        """Where the layer's tokens lie."""
        return self.tensors.device

    @property
    def n_bytes(self) -> int:
        """Bytes of its tensors."""
        turning = 0 if self.turning is None else self.turning.frequencies.untyped_storage().nbytes()
        return self.tensors.n_bytes + turning


def _centring(frames: FrameSet, layer: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What every key of a layer loses, what it loses by its position (n_kv_heads, d each), and the
    radians per token of that (d / 2)."""
    if frames.key_mean is None or frames.centring_of(layer) == "none":
        return None, None, None
    mean = torch.from_numpy(frames.key_mean[layer].copy())
    if not frames.needs_positions(layer):
        return mean, None, None
    assert frames.inv_freq is not None
    residual = None
    if frames.residual_mean is not None:
        residual = torch.from_numpy(frames.residual_mean[layer].copy())
    return residual, mean, torch.from_numpy(frames.inv_freq[layer].copy())


def _quarter_turned(mean: Tensor) -> Tensor:
    first, second = mean.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
