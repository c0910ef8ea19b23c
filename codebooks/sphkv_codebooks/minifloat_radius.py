"""Block radii as small unsigned floats, without a norm: IEEE 754's idea, cut short (ours)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from sphkv_codebooks.angle_density import FloatArray
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.radius_coding import RadiusCoding, RadiusMoments, StoredRadii, present


@dataclass(frozen=True)
class MinifloatRadius(RadiusCoding):
    """exponent_bits (2 to 5), mantissa_bits (1 to 10), no sign; a subset of float16 values.

    With E the exponent field, M the mantissa field and bias 2^(e-1) - 1: M 2^(1-bias-m) for E = 0,
    else (1 + M / 2^m) 2^(E-bias). Five exponent bits leave out E = 31, so that every code, shifted
    to the left by 10 - m, is a finite float16 of the same value. Rounding is to nearest, halves up;
    beyond the largest value it saturates.
    """

    exponent_bits: int
    mantissa_bits: int
    norm_bits = 0

    def __post_init__(self) -> None:
        if not 2 <= self.exponent_bits <= 5 or not 1 <= self.mantissa_bits <= 10:
            raise CodeError(
                f"minifloat:{self.exponent_bits},{self.mantissa_bits} is out of range: "
                "2 to 5 exponent bits and 1 to 10 mantissa bits"
            )

    @property
    def bits_per_radius(self) -> int:  # type: ignore[override]
        return self.exponent_bits + self.mantissa_bits

    @property
    def spec(self) -> str:
        return f"minifloat:{self.exponent_bits},{self.mantissa_bits}"

    @property
    def values(self) -> FloatArray:
        """The value of every code in use, ascending; all are float16 numbers."""
        bias = 2 ** (self.exponent_bits - 1) - 1
        n_exponents = 2**self.exponent_bits - (1 if self.exponent_bits == 5 else 0)
        code = np.arange(n_exponents * 2**self.mantissa_bits)
        exponent, mantissa = code >> self.mantissa_bits, code % 2**self.mantissa_bits
        fraction = mantissa / 2.0**self.mantissa_bits
        normal = (1.0 + fraction) * 2.0 ** (exponent - bias)
        subnormal = fraction * 2.0 ** (1 - bias)
        return np.asarray(np.where(exponent == 0, subnormal, normal), dtype=np.float64)

    @property
    def largest(self) -> float:
        return float(self.values[-1])

    def encode(self, radii: torch.Tensor, norms: torch.Tensor) -> StoredRadii:
        values = self.values
        middles = torch.as_tensor(0.5 * (values[1:] + values[:-1]), device=radii.device)
        codes = torch.bucketize(radii.contiguous(), middles.to(torch.float32), right=True)
        return StoredRadii(codes=codes.to(torch.int16))

    def decode(self, stored: StoredRadii, dtype: torch.dtype) -> torch.Tensor:
        codes = present(stored.codes, "radius_codes")
        return torch.as_tensor(self.values, device=codes.device).to(dtype)[codes.long()]

    def moments(self, block_dim: int, head_dim: int) -> RadiusMoments:
        """For a radius spread over whole octaves (log-uniform); range limits left out.

        Relative error e = h^2 / 12 E[1 / f^2], f log-uniform in [1, 2): E = 3 / (8 ln 2), h = 2^-m.
        E rhohat = E rho and E rhohat^2 = 1 - e would hold at cell centroids; values are midpoints,
        so E (rho - rhohat)^2 = e and E[rho rhohat] = 1 to first order.
        """
        step = 2.0**-self.mantissa_bits
        relative_mse = step**2 / 12.0 * 3.0 / (8.0 * math.log(2.0))
        return RadiusMoments(1.0 + relative_mse, 1.0, relative_mse)
