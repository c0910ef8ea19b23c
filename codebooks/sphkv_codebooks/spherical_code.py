"""The whole format of a coded vector: recursive polar angles, one codebook per level, coded radii.

    x -> (angles of levels 1..depth, head_dim / 2^depth radii) -> codes            (PolarQuant,
    2502.02617) code_rate = (sum_l head_dim / 2^l log2 n_cells_l + n_radii bits_per_radius + norm
    bits) / head_dim

The paper's code is SphericalCode.analytic("paper-4222", 128, (4, 2, 2, 2), "fp16"). Encoding is
defined exactly (encoder.py, radius.py): float32 operations that every IEEE device rounds the same
way, no atan2, so that a kernel can match it bit for bit. It takes float32 whatever comes in
(bfloat16 and float16 widen exactly, float64 is rounded).

gain folds a correction into the stored float16 numbers, free when decoding (DRIVE, arXiv
2105.08339, and EDEN, 2108.08842). With xhat the decode of the codes at unit gain: least_squares
scales by <x, xhat> / ||xhat||^2, unbiased by ||x||^2 / <x, xhat>; per block where each block stores
its radius, else per vector.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from sphkv_codebooks.codebook import Codebook
from sphkv_codebooks.density import analytic_density
from sphkv_codebooks.description import describe_code, described_fields
from sphkv_codebooks.direction_tables import cos_sin_of
from sphkv_codebooks.encoded import EncodedVectors
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.lloyd_max import lloyd_max
from sphkv_codebooks.polar import Pairing, check_depth, check_pairing, recursive_dot
from sphkv_codebooks.radius import (
    LloydMaxRadius,
    NormRadius,
    RadiusCoding,
    radius_coding_from_spec,
)
from sphkv_codebooks.vector_coder import decode_vectors, encode_vectors

Gain = Literal["none", "least_squares", "unbiased"]


@dataclass(frozen=True)
class SphericalCode:
    """A code of vectors of `head_dim` coordinates; validated when it is built."""

    name: str
    head_dim: int
    depth: int
    n_cells: tuple[int, ...]
    pairing: Pairing
    radius_coding: RadiusCoding
    gain: Gain
    codebooks: tuple[Codebook, ...]

    def __post_init__(self) -> None:
        check_depth(self.head_dim, self.depth)
        check_pairing(self.pairing)
        if self.gain not in get_args(Gain):
            raise CodeError(f"gain must be one of {get_args(Gain)}, got {self.gain!r}")
        if len(self.n_cells) != self.depth or len(self.codebooks) != self.depth:
            raise CodeError(
                f"{self.name}: depth {self.depth} needs as many codebooks, "
                f"got {len(self.codebooks)}"
            )
        for level, (book, cells) in enumerate(
            zip(self.codebooks, self.n_cells, strict=True), start=1
        ):
            if book.level != level or book.n_cells != cells:
                raise CodeError(
                    f"{self.name}: level {level} wants {cells} cells, its codebook is for level "
                    f"{book.level} with {book.n_cells}"
                )
        is_full = self.n_radii == 1
        if isinstance(self.radius_coding, NormRadius) and not is_full:
            raise CodeError(
                f"{self.name}: radius 'norm' needs full depth, but depth {self.depth} of head_dim "
                f"{self.head_dim} leaves {self.n_radii} radii; use fp16 or lloyd_max:2"
            )
        if isinstance(self.radius_coding, LloydMaxRadius) and is_full:
            raise CodeError(f"{self.name}: at full depth the radius is the norm; use 'norm'")
        if self.gain == "unbiased" and self.codebooks[0].max_cell_radius >= np.pi / 2 - 1e-9:
            raise CodeError(
                f"{self.name}: an unbiased gain divides by <x, xhat>, which {self.n_cells[0]} "
                "cells on level 1 can make zero; use 3 cells or more"
            )

    @classmethod
    def analytic(
        cls,
        name: str,
        head_dim: int,
        bits: Sequence[int] = (4, 2, 2, 2),
        radius: str = "fp16",
        *,
        n_cells: Sequence[int] | None = None,
        pairing: Pairing = "adjacent",
        gain: Gain = "none",
    ) -> SphericalCode:
        """Lloyd-Max books of the analytic densities; n_cells, if given, replaces 2^bits."""
        if n_cells is None:
            for level, level_bits in enumerate(bits, start=1):
                if not 0 <= level_bits <= 8:
                    raise CodeError(f"{name}: level {level} may have 0 to 8 bits, not {level_bits}")
            n_cells = tuple(2**level_bits for level_bits in bits)
        cells = tuple(int(count) for count in n_cells)
        check_depth(head_dim, len(cells))
        books = tuple(
            lloyd_max(analytic_density(level), count) for level, count in enumerate(cells, start=1)
        )
        coding = radius_coding_from_spec(radius, 1 << len(cells), head_dim)
        return cls(name, head_dim, len(cells), cells, pairing, coding, gain, books)

    def with_codebooks(self, name: str, codebooks: Sequence[Codebook]) -> SphericalCode:
        """The same format with other books, such as empirical ones."""
        books = tuple(codebooks)
        cells = tuple(book.n_cells for book in books)
        return SphericalCode(
            name,
            self.head_dim,
            len(books),
            cells,
            self.pairing,
            self.radius_coding,
            self.gain,
            books,
        )

    @property
    def n_radii(self) -> int:
        return self.head_dim >> self.depth

    @property
    def block_dim(self) -> int:
        """Coordinates under one radius."""
        return 1 << self.depth

    @property
    def n_angles(self) -> tuple[int, ...]:
        """Angles per vector on each level."""
        return tuple(self.head_dim >> level for level in range(1, self.depth + 1))

    @property
    def bits_per_vector(self) -> float:
        """Codes, radii and norm; fractional where a level's cells are no power of two."""
        angle_bits = sum(
            count * book.bits for count, book in zip(self.n_angles, self.codebooks, strict=True)
        )
        coding = self.radius_coding
        return float(angle_bits + self.n_radii * coding.bits_per_radius + coding.norm_bits)

    @property
    def code_rate(self) -> float:
        """Bits per coordinate of one vector; no padding, no metadata."""
        return self.bits_per_vector / self.head_dim

    def distortion(self) -> float:
        """D = E||x - xhat||^2 / ||x||^2 predicted for isotropic input."""
        from sphkv_codebooks.distortion import predicted_distortion

        return predicted_distortion(self)

    def encode(self, x: torch.Tensor, *, check: bool = True) -> EncodedVectors:
        """Codes of x (..., head_dim), any float dtype, on x's device.

        check: refuse NaN, Inf and vectors whose stored radii leave float16's range (on a GPU this
        waits for the device). Without it such radii saturate at 65504 and NaN gives arbitrary
        codes.
        """
        return encode_vectors(self, x, check=check)

    def decode(self, encoded: EncodedVectors, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """xhat (..., head_dim) in `dtype`; float64 gives the reference decode of the same codes."""
        return decode_vectors(self, encoded, dtype=dtype)

    def decode_radii(
        self, encoded: EncodedVectors, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Stored radii (..., n_radii), gain included."""
        return self.radius_coding.decode(encoded.stored_radii, dtype)

    def angle_domain_dot(
        self, q: torch.Tensor, encoded: EncodedVectors, dtype: torch.dtype = torch.float64
    ) -> torch.Tensor:
        """q . xhat from the codes by the angle-domain recursion; leading axes broadcast."""
        pairs = tuple(
            cos_sin_of(book, codes, dtype)
            for book, codes in zip(self.codebooks, encoded.angle_codes, strict=True)
        )
        radii = self.decode_radii(encoded, dtype)
        return recursive_dot(q.to(dtype), pairs, radii, self.pairing)

    def describe(self) -> dict[str, Any]:
        """A JSON description from which from_description rebuilds this code bit for bit."""
        return describe_code(self)

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> SphericalCode:
        """The code of a description made by describe, possibly by way of JSON."""
        return cls(**described_fields(description))

    @property
    def digest(self) -> str:
        """SHA-256 hex of the description without the name: equal digests, equal bits."""
        content = {key: value for key, value in self.describe().items() if key != "name"}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()
