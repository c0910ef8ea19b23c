"""Books fitted to the angles of one model: per (layer, KV head), for keys and for values apart.

They replace the books of a `SphericalCode`, level by level; its radii and its format stay.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

import h5py
import numpy as np
import numpy.typing as npt

from sphkv_cli.artifacts.fit_tables import VectorKind
from sphkv_codebooks.codebook import Codebook
from sphkv_codebooks.polar import Pairing
from sphkv_codebooks.spherical_code import SphericalCode

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BookKey:
    """Which books: of keys or values, for one pairing, level and number of cells."""

    vectors: VectorKind
    pairing: Pairing
    level: int
    n_cells: int

    @property
    def path(self) -> str:
        """Where codebooks.h5 keeps them, below `empirical`."""
        return f"{self.pairing}/{self.vectors}/level_{self.level}/cells_{self.n_cells}"


@dataclass(frozen=True)
class BookArrays:
    """centroids (n_layers, n_kv_heads, n_cells), thresholds (n_layers, n_kv_heads, n_thresholds),
    radians, float64; a circle (level 1) has n_cells thresholds, any other level n_cells - 1.
    """

    centroids: FloatArray
    thresholds: FloatArray


@dataclass(frozen=True)
class EmpiricalBooks:
    """All empirical books of a fit."""

    books: Mapping[BookKey, BookArrays]

    def book(self, key: BookKey, layer: int, head: int) -> Codebook:
        """The book of one head."""
        arrays = self.books[key]
        return Codebook(
            key.level,
            arrays.centroids[layer, head],
            arrays.thresholds[layer, head],
            is_circle=key.level == 1,
        )

    def code(
        self, code: SphericalCode, vectors: VectorKind, layer: int, head: int
    ) -> SphericalCode:
        """`code` with the books of one head; raises KeyError where none were fitted for it."""
        books = [
            self.book(BookKey(vectors, code.pairing, level, n_cells), layer, head)
            for level, n_cells in enumerate(code.n_cells, start=1)
        ]
        return code.with_codebooks(code.name, books)


def book_keys(codes: tuple[SphericalCode, ...]) -> tuple[BookKey, ...]:
    """Every kind of book that these codes need, each once, in order."""
    keys: dict[BookKey, None] = {}
    for code in codes:
        for level, n_cells in enumerate(code.n_cells, start=1):
            for vectors in get_args(VectorKind):
                keys[BookKey(vectors, code.pairing, level, n_cells)] = None
    return tuple(keys)


def write_empirical_books(parent: h5py.Group, books: EmpiricalBooks) -> None:
    """Store them as the group `empirical`."""
    group = parent.create_group("empirical")
    for key, arrays in books.books.items():
        place = group.create_group(key.path)
        for name, values in (("centroids", arrays.centroids), ("thresholds", arrays.thresholds)):
            dataset = place.create_dataset(name, data=values.astype("<f8"))
            dataset.attrs["axes"] = f"n_layers, n_kv_heads, n_{name}"
            dataset.attrs["unit"] = "rad"


def read_empirical_books(
    parent: h5py.Group, codes: tuple[SphericalCode, ...], n_layers: int, n_kv_heads: int
) -> EmpiricalBooks:
    """The inverse of `write_empirical_books`, for the codes of the file.

    Raises:
        KeyError, ValueError: a book is missing or damaged.
    """
    group = parent["empirical"]
    found: dict[BookKey, BookArrays] = {}
    for key in book_keys(codes):
        if key.path not in group:
            raise KeyError(f"no empirical/{key.path}")
        centroids = group[f"{key.path}/centroids"][()]
        thresholds = group[f"{key.path}/thresholds"][()]
        n_thresholds = key.n_cells if key.level == 1 else key.n_cells - 1
        for values, n_entries in ((centroids, key.n_cells), (thresholds, n_thresholds)):
            if values.shape != (n_layers, n_kv_heads, n_entries):
                raise ValueError(f"empirical/{key.path} has shape {values.shape}")
        found[key] = BookArrays(centroids, thresholds)
    books = EmpiricalBooks(found)
    for key, layer, head in _every_book(found, n_layers, n_kv_heads):
        books.book(key, layer, head)  # validates
    return books


def _every_book(
    keys: Mapping[BookKey, BookArrays], n_layers: int, n_kv_heads: int
) -> Iterator[tuple[BookKey, int, int]]:
    for key in keys:
        for layer in range(n_layers):
            for head in range(n_kv_heads):
                yield key, layer, head
