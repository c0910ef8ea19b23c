"""How the radii of the last level are stored.

fp16           one float16 per block.
norm           full depth: the one radius is the norm, one float16 per vector.
minifloat:e,m  e exponent and m mantissa bits per block, no sign, no norm.
lloyd_max:b    b bits per block against one float16 norm per vector: the code is the Lloyd-Max cell
of
               rho = r sqrt(n_radii) / norm (radius_density.py).

Distortion with a quantised radius (rho^2 of mean 1): D = 1 + E rhohat^2 - 2 E[rho rhohat] G. Over
the centroids alone this is minimised by rhohat_i = G E[rho | cell i]: the thresholds stay those of
plain Lloyd-Max and every centroid shrinks by G, which is the least-squares gain of
spherical_code.py folded into the book instead of the norm. So the book here is the plain one, and
`gain` decides. At 4/2/2/2 it costs (chi limit) +.86, +3.14, +10.7 % of D for 4, 3, 2 bits; the
exact Beta law for head_dim 128, used here, +.74, +2.7, +9.3 %.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from sphkv_codebooks.density import FloatArray
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.lloyd_max import companding_thresholds, fixed_point
from sphkv_codebooks.radius_density import RadiusDensity

FP16_MAX = 65504.0
NORM_BITS = 16


def to_fp16(values: torch.Tensor) -> torch.Tensor:
    """Round to nearest even; magnitudes beyond 65504 saturate, they never become infinite."""
    return values.clamp(-FP16_MAX, FP16_MAX).to(torch.float16)


@dataclass(frozen=True)
class StoredRadii:
    """What a radius coding keeps; exactly the parts it needs are not None.

    codes: (..., n_radii) uint8 or int16; radii: (..., n_radii) float16; norms: (...) float16.
    """

    codes: torch.Tensor | None = None
    radii: torch.Tensor | None = None
    norms: torch.Tensor | None = None


@dataclass(frozen=True)
class RadiusMoments:
    """E rhohat^2, E[rho rhohat] and E[(rho - rhohat)^2 rhohat^2], with E rho^2 = 1."""

    mean_square: float = 1.0
    correlation: float = 1.0
    aligned_error: float = 0.0


class RadiusCoding(ABC):
    """Storage of the (..., n_radii) radii of vectors with norms (...)."""

    bits_per_radius: int
    """Bits of each of the n_radii fields."""
    norm_bits: int
    """Bits of the per-vector norm, 0 where there is none."""

    @property
    def largest(self) -> float:
        """The largest radius (or norm) that fits; beyond it encoding saturates."""
        return FP16_MAX

    @property
    @abstractmethod
    def spec(self) -> str:
        """The text that `radius_coding_from_spec` reads."""

    @abstractmethod
    def encode(self, radii: torch.Tensor, norms: torch.Tensor) -> StoredRadii:
        """Codes of float32 radii (..., n_radii) with float32 norms (...)."""

    @abstractmethod
    def decode(self, stored: StoredRadii, dtype: torch.dtype) -> torch.Tensor:
        """Radii (..., n_radii)."""

    @abstractmethod
    def moments(self, block_dim: int, head_dim: int) -> RadiusMoments:
        """Moments of the stored radius for isotropic input, E rho^2 = 1."""


@dataclass(frozen=True)
class Fp16Radius(RadiusCoding):
    """One float16 per block: the paper's choice."""

    bits_per_radius = 16
    norm_bits = 0

    @property
    def spec(self) -> str:
        return "fp16"

    def encode(self, radii: torch.Tensor, norms: torch.Tensor) -> StoredRadii:
        return StoredRadii(radii=to_fp16(radii))

    def decode(self, stored: StoredRadii, dtype: torch.dtype) -> torch.Tensor:
        return _present(stored.radii, "radii").to(dtype)

    def moments(self, block_dim: int, head_dim: int) -> RadiusMoments:
        return RadiusMoments()  # rounding to 11 significant bits adds about 1e-7 to D


@dataclass(frozen=True)
class NormRadius(RadiusCoding):
    """Full depth: the only radius is the norm."""

    bits_per_radius = 0
    norm_bits = NORM_BITS

    @property
    def spec(self) -> str:
        return "norm"

    def encode(self, radii: torch.Tensor, norms: torch.Tensor) -> StoredRadii:
        return StoredRadii(norms=to_fp16(radii[..., 0]))

    def decode(self, stored: StoredRadii, dtype: torch.dtype) -> torch.Tensor:
        return _present(stored.norms, "norms").to(dtype)[..., None]

    def moments(self, block_dim: int, head_dim: int) -> RadiusMoments:
        return RadiusMoments()


@dataclass(frozen=True, eq=False)
class LloydMaxRadius(RadiusCoding):
    """bits per block against one norm; centroids (2^bits,), thresholds (2^bits - 1,) of rho."""

    bits: int
    centroids: FloatArray
    thresholds: FloatArray
    norm_bits = NORM_BITS

    def __post_init__(self) -> None:
        _check_radius_bits(self.bits)
        for name in ("centroids", "thresholds"):
            values = np.array(getattr(self, name), dtype=np.float64)
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        n_cells = 2**self.bits
        if self.centroids.shape != (n_cells,) or self.thresholds.shape != (n_cells - 1,):
            raise CodeError(f"a {self.bits}-bit radius book has {n_cells} centroids")
        ordered = np.empty(2 * n_cells - 1)
        ordered[0::2], ordered[1::2] = self.centroids, self.thresholds
        if not np.isfinite(ordered).all() or ordered[0] < 0 or (np.diff(ordered) <= 0).any():
            raise CodeError("a radius book needs 0 <= c_0 < t_0 < c_1 < ... , all finite")

    @classmethod
    def design(cls, bits: int, block_dim: int, head_dim: int | None) -> LloydMaxRadius:
        """The Lloyd-Max book of rho for isotropic input (head_dim None: the chi limit)."""
        _check_radius_bits(bits)
        return _design(bits, block_dim, head_dim)

    @property
    def bits_per_radius(self) -> int:  # type: ignore[override]
        return self.bits

    @property
    def spec(self) -> str:
        return f"lloyd_max:{self.bits}"

    def encode(self, radii: torch.Tensor, norms: torch.Tensor) -> StoredRadii:
        """Cell i holds t_(i-1) <= rho < t_i, decided as r >= float32(t / sqrt(n_radii)) * norm.

        Exact in IEEE float32, like the angles; a zero vector passes every threshold.
        """
        scale = radii.shape[-1] ** -0.5
        codes = torch.zeros(radii.shape, dtype=torch.uint8, device=radii.device)
        for threshold in (self.thresholds * scale).astype(np.float32).tolist():
            codes += radii >= (norms * threshold)[..., None]
        return StoredRadii(codes=codes, norms=to_fp16(norms))

    def relative_radii(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """rhohat / sqrt(n_radii): radii of a vector of norm one, (..., n_radii)."""
        scale = codes.shape[-1] ** -0.5
        table = torch.as_tensor(self.centroids * scale, device=codes.device).to(dtype)
        return table[codes.long()]

    def decode(self, stored: StoredRadii, dtype: torch.dtype) -> torch.Tensor:
        relative = self.relative_radii(_present(stored.codes, "radius_codes"), dtype)
        return relative * _present(stored.norms, "norms").to(dtype)[..., None]

    def moments(self, block_dim: int, head_dim: int | None) -> RadiusMoments:
        """head_dim None asks for the chi limit."""
        density = RadiusDensity(block_dim, head_dim)
        edges = np.concatenate([[0.0], np.minimum(self.thresholds, density.upper), [density.upper]])
        mass, offset, square = density.partial_moments(edges[:-1], edges[1:], self.centroids)
        mean_square = float((mass * self.centroids**2).sum())
        return RadiusMoments(
            mean_square,
            mean_square + float((offset * self.centroids).sum()),
            float((square * self.centroids**2).sum()),
        )


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
        codes = _present(stored.codes, "radius_codes")
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


@lru_cache(maxsize=256)
def _design(bits: int, block_dim: int, head_dim: int | None) -> LloydMaxRadius:
    density = RadiusDensity(block_dim, head_dim)
    thresholds, centroids = fixed_point(density, companding_thresholds(density, 2**bits), 1e-12)
    return LloydMaxRadius(bits, centroids, thresholds)


def _check_radius_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise CodeError(f"a Lloyd-Max radius has 1 to 8 bits, not {bits}")


def _present(part: torch.Tensor | None, name: str) -> torch.Tensor:
    if part is None:
        raise CodeError(f"these encoded vectors carry no {name}: they belong to another code")
    return part


def radius_coding_from_spec(spec: str, block_dim: int, head_dim: int) -> RadiusCoding:
    """Read "fp16", "norm", "minifloat:e,m" or "lloyd_max:b"."""
    name, _, arguments = spec.partition(":")
    try:
        numbers = [int(part) for part in arguments.split(",")] if arguments else []
    except ValueError:
        numbers = [-1]
    if name == "fp16" and not arguments:
        return Fp16Radius()
    if name == "norm" and not arguments:
        return NormRadius()
    if name == "minifloat" and len(numbers) == 2:
        return MinifloatRadius(*numbers)
    if name == "lloyd_max" and len(numbers) == 1:
        return LloydMaxRadius.design(numbers[0], block_dim, head_dim)
    raise CodeError(
        f"radius coding {spec!r} is unknown: use fp16, norm, lloyd_max:2 or minifloat:5,6"
    )
