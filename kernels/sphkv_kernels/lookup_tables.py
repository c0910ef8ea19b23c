"""Tables of the CUDA decode: fp16 entries of four numbers, built from the codebooks in float64.

    pair row (c0, c1)          cos c0, sin c0, cos c1, sin c1
    upper row (p0, p1, s)      cos s cos p0, cos s sin p0, sin s cos p1, sin s sin p1
    quad row (c0, c1, p)       cos p cos c0, cos p sin c0, sin p cos c1, sin p sin c1

Each table answers one lookup of `cuda/formats.cuh`; which table a scheme needs, in which order, is
the order of the template arguments there. Bits of a row index are those of `layout`. Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sphkv_codebooks.radius import LloydMaxRadius
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.layout import NativeLayout
from sphkv_kernels.tier import PageError

Table = npt.NDArray[np.float16]
SYMMETRY_RAD = 1e-3
"""Largest asymmetry of a level-4 book about pi/4 that the mirrored table of 4/2/2/2 may hide."""


@dataclass(frozen=True)
class CodeTables:
    """What the kernel looks up for one code.

    shared: tables (n_rows, 4) for shared memory, in the order of the scheme's template arguments;
    registers: one row of four fp16 kept in registers (zeros where the scheme has none).
    """

    shared: tuple[Table, ...]
    registers: Table


@dataclass(frozen=True)
class _Books:
    """Cosines and sines per level, and radii: as many as there are codes."""

    cos: tuple[npt.NDArray[np.float64], ...]
    sin: tuple[npt.NDArray[np.float64], ...]
    radius: npt.NDArray[np.float64]


def code_tables(code: SphericalCode, layout: NativeLayout) -> CodeTables:
    """The tables of a native code; PageError where its books do not fit the scheme."""
    books = _books(code)
    no_registers = np.zeros(4, dtype=np.float16)
    b1, b2, b3, b4 = layout.level_bits
    if layout.scheme in ("pair_half", "pair_swap"):
        mirrored = np.abs(
            code.codebooks[3].centroids[::-1] + code.codebooks[3].centroids - np.pi / 2
        )
        if mirrored.max() > SYMMETRY_RAD:
            raise PageError(
                f"code {code.name!r}: its level-4 codebook is not symmetric about pi/4, which the "
                "CUDA kernel's tables for 4/2/2/2 rely on; use an analytic book on level 4"
            )
        upper = _upper(books, b2, b3) * books.cos[3][np.arange(256) >> 6][:, None]
        registers = books.radius.astype(np.float16) if layout.has_norm else no_registers
        return CodeTables((_pairs(books, b1), _half(upper)), registers)
    if layout.scheme == "pair_nine":
        row = np.arange(1 << (b4 + layout.radius_bits))
        angle, radius = row & ((1 << b4) - 1), books.radius[row >> b4]
        top = _columns(radius * books.cos[3][angle], radius * books.sin[3][angle])
        return CodeTables((_pairs(books, b1), _half(_upper(books, b2, b3)), top), no_registers)
    if layout.scheme == "pair_nine_float":
        top = _columns(books.cos[3], books.sin[3])
        return CodeTables((_pairs(books, b1), _half(_upper(books, b2, b3)), top), no_registers)
    if layout.scheme == "single":
        row = np.arange(256)
        code1, other = row & 31, row >> 5
        first = (books.cos[0][code1], books.sin[0][code1])
        levels = tuple(
            _columns(*first, books.cos[level][other], books.sin[level][other])
            for level in (1, 2, 3)
        )
        radius = books.radius[other]
        return CodeTables((*levels, _columns(*first, radius, radius)), no_registers)
    if layout.scheme == "quad":
        row = np.arange(256)
        s0, s1, u, r = row & 3, (row >> 2) & 3, (row >> 4) & 3, row >> 6
        return CodeTables((_quads(books, 2), _weights(books, s0, s1, u, r)), no_registers)
    row = np.arange(16)
    s0, s1, u, r = row & 1, (row >> 1) & 1, (row >> 2) & 1, row >> 3
    return CodeTables((_quads(books, 1), _weights(books, s0, s1, u, r)), no_registers)


def wide_tables(code: SphericalCode, layout: NativeLayout) -> tuple[Table, Table]:
    """Upper weights of 4/2/2/2 with a 2-bit radius, radius included: rows of each half (512, 4) are
    (the byte of `code_tables`, high bit of the radius code), the half is its low bit."""
    books = _books(code)
    _, b2, b3, _ = layout.level_bits
    upper = _upper(books, b2, b3) * books.cos[3][np.arange(256) >> 6][:, None]
    low, high = (
        _half(np.concatenate([upper * books.radius[half], upper * books.radius[half + 2]]))
        for half in (0, 1)
    )
    return low, high


def _books(code: SphericalCode) -> _Books:
    angles = [book.centroids for book in code.codebooks]
    coding = code.radius_coding
    radius = np.zeros(1)
    if isinstance(coding, LloydMaxRadius):
        radius = coding.centroids / np.sqrt(code.n_radii)  # a radius per norm / sqrt(n_blocks)
    return _Books(tuple(map(np.cos, angles)), tuple(map(np.sin, angles)), radius)


def _half(table: npt.NDArray[np.float64]) -> Table:
    return np.ascontiguousarray(table.astype(np.float16))


def _columns(*columns: npt.NDArray[np.float64]) -> Table:
    """Rows of four fp16 from up to four columns, the rest zero."""
    rows = np.zeros((columns[0].size, 4))
    rows[:, : len(columns)] = np.stack(columns, axis=1)
    return _half(rows)


def _pairs(books: _Books, bits: int) -> Table:
    row = np.arange(1 << (2 * bits))
    first, second = row & ((1 << bits) - 1), row >> bits
    cos, sin = books.cos[0], books.sin[0]
    return _columns(cos[first], sin[first], cos[second], sin[second])


def _upper(books: _Books, bits2: int, bits3: int) -> npt.NDArray[np.float64]:
    """Weights of four level-1 pairs from (p0, p1, s); 256 rows or more, repeating."""
    row = np.arange(max(256, 1 << (2 * bits2 + bits3)))
    p0 = row & ((1 << bits2) - 1)
    p1 = (row >> bits2) & ((1 << bits2) - 1)
    s = (row >> (2 * bits2)) & ((1 << bits3) - 1)
    cos2, sin2, cos3, sin3 = books.cos[1], books.sin[1], books.cos[2][s], books.sin[2][s]
    return np.stack([cos3 * cos2[p0], cos3 * sin2[p0], sin3 * cos2[p1], sin3 * sin2[p1]], axis=1)


def _quads(books: _Books, bits2: int) -> Table:
    """Four coordinates from (c0, c1, p) with 3-bit level-1 codes; bits above are ignored."""
    row = np.arange(256)
    c0, c1, p = row & 7, (row >> 3) & 7, (row >> 6) & ((1 << bits2) - 1)
    cos, sin, cos2, sin2 = books.cos[0], books.sin[0], books.cos[1][p], books.sin[1][p]
    return _columns(cos2 * cos[c0], cos2 * sin[c0], sin2 * cos[c1], sin2 * sin[c1])


def _weights(
    books: _Books,
    s0: npt.NDArray[np.int64],
    s1: npt.NDArray[np.int64],
    u: npt.NDArray[np.int64],
    r: npt.NDArray[np.int64],
) -> Table:
    """Weights of the four quads of a block, radius included."""
    cos3, sin3 = books.cos[2], books.sin[2]
    left, right = books.radius[r] * books.cos[3][u], books.radius[r] * books.sin[3][u]
    return _columns(left * cos3[s0], left * sin3[s0], right * cos3[s1], right * sin3[s1])
