"""What a centring before RoPE adds to each logit: a short trigonometric sum of the position.

    q . c_t = sum_j a_j cos(f_j t) + b_j sin(f_j t),   j over the RoPE pairs that the mean keeps

added to q'.k' before softmax_scale and before any soft-cap.  a and b depend on the query head
alone, the frequencies on its KV head; 2 n_pairs multiply-adds per token and query head.  Ours; the
derivation is in `sphkv_codebooks.rotary`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_codebooks.frame import FrameSet
from sphkv_kernels.tier import PageError


@dataclass(frozen=True)
class PositionTerm:
    """coefficients: ``(n_sequences, n_q_heads, 2, n_pairs)``, the cos row and the sin row (float32
    for the kernel, float64 too for the reference).  frequencies: ``(n_kv_heads, n_pairs) float32``
    radians per token.  Raises PageError on shapes that do not fit.
    """

    coefficients: Tensor
    frequencies: Tensor

    def __post_init__(self) -> None:
        c, f = self.coefficients, self.frequencies
        if (
            c.ndim != 4
            or f.ndim != 2
            or c.shape[2:] != (2, f.shape[-1])
            or f.shape[0] == 0
            or c.shape[1] % f.shape[0]
        ):
            raise PageError(
                f"position_term: coefficients {tuple(c.shape)} and frequencies {tuple(f.shape)} "
                "do not fit, expected (n_sequences, n_q_heads, 2, n_pairs) and (n_kv_heads, "
                "n_pairs)"
            )
        if c.dtype not in (torch.float32, torch.float64) or f.dtype != torch.float32:
            raise PageError(
                f"position_term: coefficients are {c.dtype} and frequencies {f.dtype}, expected "
                "float32 or float64, and float32"
            )

    @staticmethod
    def of(frames: FrameSet, layer: int, queries: Tensor) -> PositionTerm | None:
        """The term of untransformed queries ``(n_sequences, n_q_heads, head_dim)`` in one layer;
        None where the layer is not centred before RoPE."""
        found = frames.position_coefficients(layer, queries)
        return None if found is None else PositionTerm(*found)

    @property
    def n_pairs(self) -> int:
        """RoPE pairs per KV head."""
        return self.frequencies.shape[1]

    def to(self, device: torch.device | str) -> PositionTerm:
        """The same on another device, as the kernel takes it: float32."""
        return PositionTerm(
            self.coefficients.to(device, torch.float32).contiguous(),
            self.frequencies.to(device).contiguous(),
        )

    def select(self, sequences: Tensor) -> PositionTerm:
        """The term of some of the sequences, ``(n) int64``."""
        return PositionTerm(self.coefficients[sequences], self.frequencies)

    def logits(self, heads: Tensor, positions: Tensor) -> Tensor:
        """q . c_t in float64 for rows of tokens, each of one (sequence, KV head).

        heads: ``(n) int64``, sequence * n_kv_heads + KV head; positions: ``(n, n_tokens)`` integer.
        Returns ``(n, group_size, n_tokens)``.
        """
        n_kv_heads, n_pairs = self.frequencies.shape
        group_size = self.coefficients.shape[1] // n_kv_heads
        shape = (-1, group_size, 2, n_pairs)
        of_head = self.coefficients.to(torch.float64).reshape(shape)[heads]
        frequencies = self.frequencies.to(torch.float64)[heads % n_kv_heads]
        angles = frequencies[:, :, None] * positions.to(torch.float64)[:, None, :]
        return of_head[:, :, 0] @ angles.cos() + of_head[:, :, 1] @ angles.sin()
