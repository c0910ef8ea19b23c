"""Exact encoding of pairs: which cell a pair (first, second) falls into, decided without atan2.

atan2 differs by a rounding between libraries, devices and even vector lanes. The stored codes are
therefore defined by comparisons of float32 products, which IEEE arithmetic makes the same
everywhere:

    psi >= t   <=>   second * cos(t) >= first * sin(t)      (0 <= psi, t <= pi/2)

with cos(t) and sin(t) rounded once to float32 and each product rounded on its own (no fused
multiply-add). The code is the number of thresholds passed. Ties go up: a pair exactly on a
threshold belongs to the cell above it.

Level 1 first turns the pair into the quadrant [0, pi/2] by an exact exchange of coordinates. The
sign bits of (first, second), those of -0.0 included, name the quadrant: (+, +) 0, (-, +) 1,
(-, -) 2, (+, -) 3; in quadrants 1 and 3 (|second|, |first|) takes the place of (|first|, |second|).
Thresholds in earlier quadrants count as passed. So on an axis the sign bits decide which of the two
cells that meet there is meant, and the pair (0, 0) passes every threshold of its quadrant.

Radii: r = sqrt(first * first + second * second), each operation rounded to float32 on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from sphkv_codebooks.codebook import Codebook
from sphkv_codebooks.density import HALF_PI

_SNAP_RAD = 1e-12  # a threshold this close to a quadrant's start is the start


@dataclass(frozen=True, eq=False)
class ThresholdDirections:
    """A book's thresholds as float32 directions, per quadrant.

    passed_before: (n_quadrants,) thresholds below each quadrant, less one on the circle (cell i
    starts at threshold i). cos, sin: (n_quadrants, n_per_quadrant), NaN where a quadrant has fewer
    (never passed).
    """

    n_cells: int
    passed_before: npt.NDArray[np.int64]
    cos: npt.NDArray[np.float32]
    sin: npt.NDArray[np.float32]


@lru_cache(maxsize=4096)
def threshold_directions(book: Codebook) -> ThresholdDirections:
    """The tables that encode_pairs (and a kernel that must match it) compares with."""
    n_quadrants = 4 if book.is_circle else 1
    quadrant = np.floor(book.thresholds / HALF_PI + _SNAP_RAD).astype(np.int64)
    quadrant = np.minimum(quadrant, n_quadrants - 1)
    local = book.thresholds - quadrant * HALF_PI
    local = np.where(np.abs(local) < _SNAP_RAD, 0.0, local)
    per_quadrant = np.bincount(quadrant, minlength=n_quadrants)
    width = int(per_quadrant.max()) if book.thresholds.size else 0
    cos = np.full((n_quadrants, width), np.nan, dtype=np.float32)
    sin = np.full((n_quadrants, width), np.nan, dtype=np.float32)
    for index in range(n_quadrants):
        inside = local[quadrant == index]
        cos[index, : inside.size] = np.cos(inside)
        sin[index, : inside.size] = np.sin(inside)
    before = np.concatenate([[0], np.cumsum(per_quadrant)[:-1]])
    return ThresholdDirections(book.n_cells, before - (1 if book.is_circle else 0), cos, sin)


def pair_radius(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """sqrt(first^2 + second^2), each operation rounded on its own."""
    squares = (first * first).add_(second * second)
    if squares.device.type == "cpu" and squares.dtype == torch.float32:
        # torch's root comes from a vector library that may be a unit off in the last place
        # (measured: 17 % of them on one CPU); numpy's is the processor's own, which IEEE binds.
        np.sqrt(squares.numpy(), out=squares.numpy())
        return squares
    return squares.sqrt_()


def encode_pairs(book: Codebook, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """uint8 codes of float32 pairs, same shape; on levels >= 2 both members must be >= 0."""
    if book.n_cells == 1:
        return torch.zeros(first.shape, dtype=torch.uint8, device=first.device)
    table = threshold_directions(book)
    if not book.is_circle:
        count = torch.zeros(first.shape, dtype=torch.float32, device=first.device)
        return _count_passed(count, first, second, table.cos[0], table.sin[0]).to(torch.uint8)
    return _encode_circle(table, first, second)


def _count_passed(
    count: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    cos: npt.NDArray[np.float32],
    sin: npt.NDArray[np.float32],
) -> torch.Tensor:
    """Adds to the float32 `count` the number of thresholds passed.

    In float32 because CPU vector units compare and add floats several times faster than booleans.
    """
    left, right = torch.empty_like(count), torch.empty_like(count)
    for c, s in zip(cos.tolist(), sin.tolist(), strict=True):
        torch.mul(second, c, out=left)
        torch.mul(first, s, out=right)
        count += left.ge_(right)
    return count


def _encode_circle(
    table: ThresholdDirections, first: torch.Tensor, second: torch.Tensor
) -> torch.Tensor:
    first_bits, second_bits = first.view(torch.int32), second.view(torch.int32)
    odd = (first_bits ^ second_bits) >> 31  # all ones in quadrants 1 and 3, else 0
    across, along = first.abs().view(torch.int32), second.abs().view(torch.int32)
    exchanged = (across ^ along) & odd
    local_first = (across ^ exchanged).view(torch.float32)
    local_second = along.bitwise_xor_(exchanged).view(torch.float32)
    quadrant = -(odd + 2 * (second_bits >> 31))
    n_cells = table.n_cells
    if n_cells % 4 == 0 and _quadrants_agree(table):
        # Equal quadrants that start on a threshold: uniform books of 4, 8, 12... cells.
        count = quadrant.mul_(n_cells // 4).to(torch.float32)
        cos, sin = table.cos[0, 1:], table.sin[0, 1:]
        return _count_passed(count, local_first, local_second, cos, sin).to(torch.uint8)
    index = quadrant.reshape(-1)

    def of_quadrant(values: npt.NDArray[np.float32]) -> torch.Tensor:
        column = torch.tensor(values.tolist(), dtype=torch.float32, device=first.device)
        return torch.index_select(column, 0, index).reshape(quadrant.shape)

    count = of_quadrant(table.passed_before.astype(np.float32))
    left, right = torch.empty_like(local_first), torch.empty_like(local_first)
    for cos, sin in zip(table.cos.T, table.sin.T, strict=True):
        torch.mul(local_second, of_quadrant(cos), out=left)
        torch.mul(local_first, of_quadrant(sin), out=right)
        count += left.ge_(right)
    return count.remainder_(n_cells).to(torch.uint8)


def _quadrants_agree(table: ThresholdDirections) -> bool:
    """Every quadrant has the same thresholds, the first of them at its start."""
    return bool(
        (table.cos[0] == table.cos).all()
        and (table.sin[0] == table.sin).all()
        and table.sin[0, 0] == 0.0
        and table.cos.shape[1] * 4 == table.n_cells
    )
