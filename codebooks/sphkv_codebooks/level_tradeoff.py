"""Cells per level against self-gain: the exact frontier of one recursion depth.

    bits(n_1..n_L) = sum_l (head_dim / 2^l) log2 n_l,    -log G = sum_l -log g_l(n_l)

with g_l(n) = E cos(psi - psihat) of the n-cell Lloyd-Max book of level l (distortion.py). Both sums
run over levels, so the choices that no other beats are found by merging one level at a time and
throwing dominated choices away: dominated prefixes never become undominated. Exact, no multiplier,
some thousand points per depth. Ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from sphkv_codebooks.angle_density import FloatArray
from sphkv_codebooks.codebook import MAX_CELLS
from sphkv_codebooks.density import analytic_density
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.lloyd_max import lloyd_max
from sphkv_codebooks.polar import check_depth

CellCounts = Literal["any", "powers_of_two"]

MAX_UPPER_CELLS = 64
"""Most cells tried on levels >= 2; level 1, a circle four times as long, gets up to 256."""


@dataclass(frozen=True)
class DepthFrontier:
    """Undominated choices of cells for `depth` levels, by rising bits and falling loss.

    bits: (n,), of all angles of a vector; loss: (n,), -log G; n_cells: (n, depth) int.
    """

    depth: int
    bits: FloatArray
    loss: FloatArray
    n_cells: npt.NDArray[np.int64]

    def within(self, budget_bits: float) -> int:
        """Index of the best choice of at most so many bits, -1 where there is none."""
        return int(np.searchsorted(self.bits, budget_bits + 1e-9, side="right")) - 1


def depth_frontiers(
    head_dim: int, max_rate: float, cells: CellCounts = "any"
) -> tuple[DepthFrontier, ...]:
    """The frontiers of depth 1..log2 head_dim, up to `max_rate` bits per coordinate of angles."""
    deepest = head_dim.bit_length() - 1
    check_depth(head_dim, deepest)
    bits, loss = np.zeros(1), np.zeros(1)
    n_cells = np.zeros((1, 0), dtype=np.int64)
    frontiers = []
    for level in range(1, deepest + 1):
        counts = _cell_counts(level, cells)
        level_bits = (head_dim >> level) * np.log2(counts)
        level_loss = -np.log(self_gains(level)[counts - 1])
        # Outer sums: every undominated prefix with every choice of this level.
        all_bits = (bits[:, None] + level_bits).ravel()
        all_loss = (loss[:, None] + level_loss).ravel()
        kept = _undominated(all_bits, all_loss, max_rate * head_dim)
        prefix, choice = np.divmod(kept, counts.size)
        bits, loss = all_bits[kept], all_loss[kept]
        n_cells = np.concatenate([n_cells[prefix], counts[choice][:, None]], axis=1)
        frontiers.append(DepthFrontier(level, bits, loss, n_cells))
    return tuple(frontiers)


@lru_cache(maxsize=32)
def self_gains(level: int) -> FloatArray:
    """E cos(psi - psihat) of the Lloyd-Max books of 1, 2, ... cells; read-only.

    One cell on the circle has gain 0: it says nothing of the direction, and is never chosen.
    """
    density = analytic_density(level)
    gains = np.array(
        [lloyd_max(density, n).self_gain(density) for n in range(1, _max_cells(level) + 1)]
    )
    if level == 1:
        gains[0] = 0.0
    gains.setflags(write=False)
    return gains


def _max_cells(level: int) -> int:
    return MAX_CELLS if level == 1 else MAX_UPPER_CELLS


def _cell_counts(level: int, cells: CellCounts) -> npt.NDArray[np.int64]:
    first = 2 if level == 1 else 1
    if cells == "any":
        return np.arange(first, _max_cells(level) + 1)
    if cells == "powers_of_two":
        return 2 ** np.arange(first - 1, _max_cells(level).bit_length())
    raise CodeError(f"cells may be 'any' or 'powers_of_two', not {cells!r}")


def _undominated(bits: FloatArray, loss: FloatArray, max_bits: float) -> npt.NDArray[np.int64]:
    """Indices of the choices within max_bits that no choice of fewer or equal bits matches."""
    order = np.lexsort((loss, bits))
    order = order[bits[order] <= max_bits]
    best_before = np.minimum.accumulate(loss[order])
    improves = np.ones(order.size, dtype=bool)
    improves[1:] = loss[order][1:] < best_before[:-1]
    return np.asarray(order[improves])
