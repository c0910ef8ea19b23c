"""Encoded vectors: the parts that are stored, as tensors with common leading axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sphkv_codebooks.radius import StoredRadii


@dataclass(frozen=True)
class EncodedVectors:
    """Codes of vectors with leading shape (...); only the parts the radius coding needs are set.

    angle_codes[l-1]: (..., head_dim / 2^l) uint8; radius_codes: (..., n_radii) uint8 or int16;
    radii: (..., n_radii) float16; norms: (...) float16.
    """

    angle_codes: tuple[torch.Tensor, ...]
    radius_codes: torch.Tensor | None = None
    radii: torch.Tensor | None = None
    norms: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """The leading shape."""
        return self.angle_codes[0].shape[:-1]

    @property
    def stored_radii(self) -> StoredRadii:
        return StoredRadii(self.radius_codes, self.radii, self.norms)

    def __getitem__(self, index: Any) -> EncodedVectors:
        """The vectors at `index` of the leading axes (no ellipsis)."""
        return EncodedVectors(
            tuple(codes[index] for codes in self.angle_codes),
            None if self.radius_codes is None else self.radius_codes[index],
            None if self.radii is None else self.radii[index],
            None if self.norms is None else self.norms[index],
        )

    def reshape(self, leading: Sequence[int]) -> EncodedVectors:
        """The same vectors with another leading shape."""

        def vectors(part: torch.Tensor) -> torch.Tensor:
            return part.reshape(*leading, part.shape[-1])

        return EncodedVectors(
            tuple(vectors(codes) for codes in self.angle_codes),
            None if self.radius_codes is None else vectors(self.radius_codes),
            None if self.radii is None else vectors(self.radii),
            None if self.norms is None else self.norms.reshape(tuple(leading)),
        )

    def to(self, device: torch.device | str) -> EncodedVectors:
        """The same codes on another device."""
        return EncodedVectors(
            tuple(codes.to(device) for codes in self.angle_codes),
            None if self.radius_codes is None else self.radius_codes.to(device),
            None if self.radii is None else self.radii.to(device),
            None if self.norms is None else self.norms.to(device),
        )


def concatenate(chunks: Sequence[EncodedVectors]) -> EncodedVectors:
    """Chunks along the one leading axis each has."""

    def joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present) if present else None

    n_levels = len(chunks[0].angle_codes)
    return EncodedVectors(
        tuple(torch.cat([c.angle_codes[level] for c in chunks]) for level in range(n_levels)),
        joined([chunk.radius_codes for chunk in chunks]),
        joined([chunk.radii for chunk in chunks]),
        joined([chunk.norms for chunk in chunks]),
    )
