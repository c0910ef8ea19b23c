"""The angles of the whole model, layer by layer: goodness of fit and pooled histograms.

Per layer the histograms of every head are reduced to a distance each and added to one pooled
histogram per level, so that memory does not grow with the number of layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt

from sphkv_cli.artifacts.capture import CaptureReader, Split
from sphkv_cli.artifacts.fit_tables import GoodnessRow, KurtosisRow, VectorKind
from sphkv_cli.fit.angle_statistics import (
    N_BINS,
    AngleHistograms,
    count_angles,
    isotropic_kurtosis,
    ks_distances,
    ks_of_sampling,
)
from sphkv_cli.fit.captured_vectors import documents_of, token_chunks
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.polar import Pairing

FloatArray = npt.NDArray[np.float64]
Place = tuple[VectorKind, Pairing]
LayerHistograms = Mapping[Place, AngleHistograms]

VECTOR_KINDS: tuple[VectorKind, ...] = get_args(VectorKind)


def count_layer(
    capture: CaptureReader,
    frames: FrameSet,
    layer: int,
    split: Split,
    pairings: tuple[Pairing, ...],
) -> dict[Place, AngleHistograms]:
    """Histograms of one layer's keys and values over the documents of a split."""
    documents = documents_of(capture, split)
    histograms: dict[Place, AngleHistograms] = {}
    for kind in VECTOR_KINDS:
        for pairing in pairings:
            chunks = (
                frames.keys_to_frame(layer, chunk, positions)
                if kind == "keys"
                else frames.values_to_frame(chunk)
                for document in documents
                for chunk, positions in token_chunks(capture, document, layer, kind)
            )
            histograms[kind, pairing] = count_angles(chunks, pairing)
    return histograms


@dataclass(frozen=True)
class _Collected:
    """One kind of vector with one pairing: ks (n_levels, n_layers, n_kv_heads), kurtosis
    (n_layers, n_kv_heads), pooled counts (n_levels, N_BINS) per split, angles per head and level.
    """

    ks: FloatArray
    kurtosis: FloatArray
    pooled: Mapping[str, npt.NDArray[np.int64]]
    n_angles: npt.NDArray[np.int64]


class AngleSurvey:
    """Collects layer after layer; then answers for the whole model."""

    def __init__(
        self, n_layers: int, n_kv_heads: int, head_dim: int, pairings: tuple[Pairing, ...]
    ) -> None:
        n_levels = head_dim.bit_length() - 1
        self.head_dim = head_dim
        self.parts = {
            (kind, pairing): _Collected(
                ks=np.zeros((n_levels, n_layers, n_kv_heads)),
                kurtosis=np.zeros((n_layers, n_kv_heads)),
                pooled={
                    split: np.zeros((n_levels, N_BINS), np.int64) for split in ("fit", "select")
                },
                n_angles=np.zeros(n_levels, np.int64),
            )
            for kind in VECTOR_KINDS
            for pairing in pairings
        }

    def add(self, layer: int, fit: LayerHistograms, select: LayerHistograms) -> None:
        """Take in one layer."""
        for place, part in self.parts.items():
            for index, counts in enumerate(fit[place].counts):
                part.ks[index, layer] = ks_distances(counts, index + 1)
                part.pooled["fit"][index] += counts.sum(axis=0)
                part.n_angles[index] = fit[place].n_angles(index + 1)
            for index, counts in enumerate(select[place].counts):
                part.pooled["select"][index] += counts.sum(axis=0)
            part.kurtosis[layer] = fit[place].kurtosis

    def head_ks(self, kind: VectorKind, pairing: Pairing, level: int) -> float:
        """Mean over heads of the distance at one level."""
        return float(self.parts[kind, pairing].ks[level - 1].mean())

    def select_counts(
        self, kind: VectorKind, pairing: Pairing, level: int
    ) -> npt.NDArray[np.int64]:
        """Pooled counts (N_BINS,) of the `select` documents."""
        return np.asarray(self.parts[kind, pairing].pooled["select"][level - 1])

    def goodness_rows(self) -> tuple[GoodnessRow, ...]:
        """One row per kind of vector, pairing and level."""
        rows = []
        for (kind, pairing), part in self.parts.items():
            for index, ks in enumerate(part.ks):
                layer, head = np.unravel_index(int(ks.argmax()), ks.shape)
                rows.append(
                    GoodnessRow(
                        vectors=kind,
                        pairing=pairing,
                        level=index + 1,
                        pooled_ks=float(ks_distances(part.pooled["fit"][index], index + 1)),
                        head_ks=float(ks.mean()),
                        sampling_ks=ks_of_sampling(int(part.n_angles[index])),
                        worst_ks=float(ks.max()),
                        worst_layer=int(layer),
                        worst_head=int(head),
                    )
                )
        return tuple(rows)

    def kurtosis_rows(self) -> tuple[KurtosisRow, ...]:
        """One row per kind of vector."""
        isotropic = isotropic_kurtosis(self.head_dim)
        rows = {}
        for (kind, _), part in self.parts.items():  # the same for every pairing
            furthest = int(np.abs(part.kurtosis - isotropic).argmax())
            layer, head = np.unravel_index(furthest, part.kurtosis.shape)
            rows[kind] = KurtosisRow(
                vectors=kind,
                isotropic=isotropic,
                mean=float(part.kurtosis.mean()),
                worst=float(part.kurtosis[layer, head]),
                worst_layer=int(layer),
                worst_head=int(head),
            )
        return tuple(rows.values())
