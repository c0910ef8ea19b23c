"""Empirical books of a layer: one per KV head, for keys and values apart, level by level.

Fitted on the histograms of the `fit` documents. Whether they help on other documents is measured,
not assumed: after rotation they usually do not (the densities are already right), without
rotation they do.
"""

from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np

from sphkv_cli.artifacts.empirical_books import BookArrays, BookKey, EmpiricalBooks
from sphkv_cli.artifacts.fit_tables import VectorKind
from sphkv_cli.fit.angle_statistics import AngleHistograms
from sphkv_codebooks.codebook import Codebook
from sphkv_codebooks.histogram_lloyd import fit_books
from sphkv_codebooks.polar import Pairing
from sphkv_codebooks.spherical_code import SphericalCode

LayerBooks = Mapping[BookKey, Sequence[Codebook]]
"""The books of one layer, per KV head."""


def fit_layer_books(
    keys: Sequence[BookKey], histograms: Mapping[tuple[VectorKind, Pairing], AngleHistograms]
) -> dict[BookKey, list[Codebook]]:
    """Books of one layer, one per KV head.

    histograms: by (vectors, pairing), of the `fit` documents.
    """
    books: dict[BookKey, list[Codebook]] = {}
    for pairing, level, n_cells in dict.fromkeys((k.pairing, k.level, k.n_cells) for k in keys):
        counts = [histograms[kind, pairing].counts[level - 1] for kind in get_args(VectorKind)]
        n_heads = len(counts[0])
        fitted = fit_books(np.concatenate(counts), level, n_cells)
        books[BookKey("keys", pairing, level, n_cells)] = fitted[:n_heads]
        books[BookKey("values", pairing, level, n_cells)] = fitted[n_heads:]
    return books


def stack_books(layers: Sequence[LayerBooks]) -> EmpiricalBooks:
    """All layers' books as arrays."""
    return EmpiricalBooks(
        {
            key: BookArrays(
                centroids=np.array([[book.centroids for book in layer[key]] for layer in layers]),
                thresholds=np.array([[book.thresholds for book in layer[key]] for layer in layers]),
            )
            for key in layers[0]
        }
    )


def codes_of_heads(
    code: SphericalCode, vectors: VectorKind, books: LayerBooks, n_kv_heads: int
) -> list[SphericalCode]:
    """`code` with the books of each KV head of the layer."""
    return [
        code.with_codebooks(
            code.name,
            [
                books[BookKey(vectors, code.pairing, level, n_cells)][head]
                for level, n_cells in enumerate(code.n_cells, start=1)
            ],
        )
        for head in range(n_kv_heads)
    ]
