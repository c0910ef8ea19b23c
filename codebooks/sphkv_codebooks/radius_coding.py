"""The interface of radius codings, and the codings that keep float16 numbers as they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from sphkv_codebooks.errors import CodeError

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
        return present(stored.radii, "radii").to(dtype)

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
        return present(stored.norms, "norms").to(dtype)[..., None]

    def moments(self, block_dim: int, head_dim: int) -> RadiusMoments:
        return RadiusMoments()


def present(part: torch.Tensor | None, name: str) -> torch.Tensor:
    """The part, or a refusal that names it."""
    if part is None:
        raise CodeError(f"these encoded vectors carry no {name}: they belong to another code")
    return part
