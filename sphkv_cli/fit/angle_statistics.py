"""Do the angles of real vectors follow the density that the analytic books assume?

Per recursion level, the Kolmogorov-Smirnov distance ``sup_psi |F_n(psi) - F(psi)|`` between the
measured angles and the analytic density (PolarQuant, arXiv 2502.02617, section 3), from
histograms that are filled document by document, so that memory does not grow with the capture. The
supremum is taken over the edges of the bins: it misses at most the mass of one bin.

The kurtosis is that of the coordinates of the direction, ``d sum_i x_i^4 / ||x||^4`` averaged over
vectors: 3 d / (d + 2) for isotropic directions, more when a few channels carry the norm.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sphkv_codebooks.density import HALF_PI, TWO_PI, analytic_density
from sphkv_codebooks.polar import Pairing, to_polar

N_BINS = 4096
"""Bins per level: narrow enough that no analytic density puts 0.3 % of its mass into one."""

Counts = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AngleHistograms:
    """Angles counted in equal bins of [0, 2 pi) at level 1 and [0, pi/2] above.

    counts: one array (n_kv_heads, N_BINS) per level; kurtosis: (n_kv_heads,); n_vectors: per head.
    """

    counts: tuple[Counts, ...]
    kurtosis: FloatArray
    n_vectors: int

    def n_angles(self, level: int) -> int:
        """Angles counted per head at this level."""
        return int(self.counts[level - 1][0].sum())


def level_end(level: int) -> float:
    """End of the range of angles of this level, radians."""
    return TWO_PI if level == 1 else HALF_PI


def count_angles(batches: Iterable[Tensor], pairing: Pairing) -> AngleHistograms:
    """Histograms at every level down to one radius per vector.

    batches: in the frame, (n_tokens, n_kv_heads, head_dim) each.
    """
    counts: list[Tensor] = []
    kurtosis_sum: Tensor | None = None
    n_vectors = 0
    for vectors in batches:
        n_tokens, n_heads, head_dim = vectors.shape
        depth = head_dim.bit_length() - 1
        if kurtosis_sum is None:
            counts = [torch.zeros(n_heads * N_BINS, dtype=torch.int64) for _ in range(depth)]
            kurtosis_sum = torch.zeros(n_heads, dtype=torch.float64)
        squared = vectors.square()
        norm_squared = squared.sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        direction = squared / norm_squared[..., None]
        kurtosis_sum += head_dim * direction.square().sum(dim=(0, 2), dtype=torch.float64)
        n_vectors += n_tokens
        first_bin = (torch.arange(n_heads) * N_BINS)[:, None]
        polar = to_polar(vectors, depth, pairing)
        for level, angles in enumerate(polar.angles, start=1):
            bins = (angles * (N_BINS / level_end(level))).to(torch.int64).clamp_(0, N_BINS - 1)
            counts[level - 1] += torch.bincount(
                (bins + first_bin).flatten(), minlength=n_heads * N_BINS
            )
    if kurtosis_sum is None:
        raise ValueError("no vectors to count")
    return AngleHistograms(
        counts=tuple(level.reshape(-1, N_BINS).numpy() for level in counts),
        kurtosis=(kurtosis_sum / n_vectors).numpy(),
        n_vectors=n_vectors,
    )


def ks_distances(counts: Counts, level: int) -> FloatArray:
    """Distance to the analytic density of each histogram; counts (..., N_BINS) -> (...)."""
    edges = np.linspace(0.0, level_end(level), N_BINS + 1)[1:]
    expected = analytic_density(level).cdf(edges)
    measured = np.cumsum(counts, axis=-1) / counts.sum(axis=-1, keepdims=True)
    return np.asarray(np.abs(measured - expected).max(axis=-1), dtype=np.float64)


def ks_of_sampling(n_angles: int) -> float:
    """The distance that as many independent draws of the density itself show on average.

    sqrt(pi / 2) ln 2 / sqrt(n): the mean of the Kolmogorov distribution.
    """
    return math.sqrt(math.pi / 2.0) * math.log(2.0) / math.sqrt(n_angles)


def isotropic_kurtosis(head_dim: int) -> float:
    """The kurtosis of a direction drawn uniformly from the sphere."""
    return 3.0 * head_dim / (head_dim + 2.0)
