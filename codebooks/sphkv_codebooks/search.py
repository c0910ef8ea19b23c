"""The best spherical codes at a rate, by the exact distortion of isotropic input.

    minimise D = 1 + E rhohat^2 - 2 E[rho rhohat] G   subject to code rate <= R

over depth, cells per level and radius coding. For a given depth and radius coding D falls with G,
so the best cells are the last point of the depth's frontier (level_tradeoff.py) that the radii
leave room for: no choice inside the space is missed. Radii at full depth are norms, as float16 or
as a minifloat; the moments of radii against a norm follow their Beta law (radius_density.py).

Pairing is not searched, as it changes nothing for rotated vectors, nor is the gain, which costs no
bits: D here is that of unit gain. Ours; the Gaussian limit 4^-R is Shannon's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sphkv_codebooks.distortion import quantised_radius_distortion
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.level_tradeoff import CellCounts, DepthFrontier, depth_frontiers
from sphkv_codebooks.polar import Pairing
from sphkv_codebooks.radius import RadiusCoding, radius_coding_from_spec
from sphkv_codebooks.spherical_code import Gain, SphericalCode

MINIFLOATS = tuple(f"minifloat:5,{mantissa}" for mantissa in range(2, 7))
BLOCK_RADII = ("fp16", *MINIFLOATS, *(f"lloyd_max:{bits}" for bits in range(1, 7)))
FULL_DEPTH_RADII = ("norm", *MINIFLOATS)


def gaussian_limit(rate: float) -> float:
    """Distortion-rate function of a Gaussian: 4^-rate."""
    return float(4.0**-rate)


def gap_db(distortion: float, rate: float) -> float:
    """How far a code of this rate is above the Gaussian limit, in dB."""
    return 10.0 * math.log10(distortion / gaussian_limit(rate))


@dataclass(frozen=True)
class CodeDesign:
    """One point of the family: cells per level and a radius coding, and what they give.

    rate: bits per coordinate, everything included; distortion: exact, unit gain, isotropic input.
    """

    head_dim: int
    n_cells: tuple[int, ...]
    radius: str
    rate: float
    distortion: float

    @property
    def depth(self) -> int:
        return len(self.n_cells)

    @property
    def overhead_bits(self) -> int:
        """Bits of radii and norm of one vector."""
        coding = radius_coding_from_spec(self.radius, 1 << self.depth, self.head_dim)
        return _radius_bits(self.head_dim, self.depth, coding)

    @property
    def gap_db(self) -> float:
        return gap_db(self.distortion, self.rate)

    @property
    def has_whole_bits(self) -> bool:
        """Whether every level's number of cells is a power of two."""
        return all(n & (n - 1) == 0 for n in self.n_cells)

    def build(
        self, name: str, *, pairing: Pairing = "adjacent", gain: Gain = "none"
    ) -> SphericalCode:
        """The code with Lloyd-Max books of the analytic densities."""
        return SphericalCode.analytic(
            name,
            self.head_dim,
            radius=self.radius,
            n_cells=self.n_cells,
            pairing=pairing,
            gain=gain,
        )


@dataclass(frozen=True)
class SearchSpace:
    """What is searched.

    cells: any number per level (packed in mixed radix) or powers of two; depths: None for all;
    block_radii, full_depth_radii: radius codings tried above and at full depth.
    """

    head_dim: int
    cells: CellCounts = "any"
    depths: tuple[int, ...] | None = None
    block_radii: tuple[str, ...] = BLOCK_RADII
    full_depth_radii: tuple[str, ...] = FULL_DEPTH_RADII

    def __post_init__(self) -> None:
        deepest = self.head_dim.bit_length() - 1
        for depth in self.depths or ():
            if not 1 <= depth <= deepest:
                raise CodeError(f"depth {depth} is out of range: 1 to {deepest}")

    def families(self, max_rate: float) -> Iterator[tuple[DepthFrontier, str, RadiusCoding]]:
        """Every depth with every radius coding that it can have."""
        for frontier in _frontiers(self.head_dim, math.ceil(max_rate), self.cells):
            if self.depths is not None and frontier.depth not in self.depths:
                continue
            block_dim = 1 << frontier.depth
            is_full = block_dim == self.head_dim
            for spec in self.full_depth_radii if is_full else self.block_radii:
                yield frontier, spec, radius_coding_from_spec(spec, block_dim, self.head_dim)


def best_codes(
    space: SearchSpace,
    rate: float,
    n_best: int | None = None,
    fits: Callable[[CodeDesign], bool] | None = None,
) -> list[CodeDesign]:
    """The best code of every (depth, radius coding) with a code rate of at most `rate`.

    Best first, n_best of them at most; empty where nothing is so small. fits: a further condition,
    such as on packed bytes; the best undominated choice of cells that meets it is taken.
    """
    if not (math.isfinite(rate) and rate > 0):
        raise CodeError(f"a rate is a number of bits above 0, not {rate}")
    found = []
    for frontier, spec, coding in space.families(rate):
        overhead = _radius_bits(space.head_dim, frontier.depth, coding)
        index = frontier.within(rate * space.head_dim - overhead)
        while index >= 0:
            design = _design(space.head_dim, frontier, index, spec, coding)
            if fits is None or fits(design):
                found.append(design)
                break
            index -= 1
    return sorted(found, key=lambda design: (design.distortion, design.rate))[:n_best]


def best_code(
    space: SearchSpace, rate: float, fits: Callable[[CodeDesign], bool] | None = None
) -> CodeDesign:
    """The code of least distortion with a code rate of at most `rate`.

    Raises:
        CodeError: the space holds no code of so few bits.
    """
    best = best_codes(space, rate, 1, fits)
    if not best:
        raise CodeError(f"no code of head_dim {space.head_dim} has a rate of {rate} bits or less")
    return best[0]


def frontier(space: SearchSpace, low: float, high: float) -> list[CodeDesign]:
    """D(R): every code with low <= rate <= high that no code of at most its rate matches."""
    if not 0 < low <= high < math.inf:
        raise CodeError(f"rates run from low to high, both above 0; got {low} to {high}")
    rates, distortions, origins = [], [], []
    families = list(space.families(high))
    for number, (depth_frontier, _, coding) in enumerate(families):
        overhead = _radius_bits(space.head_dim, depth_frontier.depth, coding)
        moments = coding.moments(1 << depth_frontier.depth, space.head_dim)
        gains = np.exp(-depth_frontier.loss)
        rates.append((depth_frontier.bits + overhead) / space.head_dim)
        distortions.append(1.0 + moments.mean_square - 2.0 * moments.correlation * gains)
        origins.append(np.stack([np.full(gains.size, number), np.arange(gains.size)], axis=1))
    rate, distortion = np.concatenate(rates), np.concatenate(distortions)
    origin = np.concatenate(origins)
    order = np.lexsort((distortion, rate))
    order = order[rate[order] <= high + 1e-9]
    found: list[CodeDesign] = []
    best = math.inf
    for place in order.tolist():
        if distortion[place] < best:
            best = distortion[place]
            if rate[place] >= low - 1e-9:
                number, index = origin[place].tolist()
                depth_frontier, spec, coding = families[number]
                found.append(_design(space.head_dim, depth_frontier, index, spec, coding))
    return found


def _design(
    head_dim: int, frontier: DepthFrontier, index: int, spec: str, coding: RadiusCoding
) -> CodeDesign:
    overhead = _radius_bits(head_dim, frontier.depth, coding)
    moments = coding.moments(1 << frontier.depth, head_dim)
    return CodeDesign(
        head_dim=head_dim,
        n_cells=tuple(frontier.n_cells[index].tolist()),
        radius=spec,
        rate=float(frontier.bits[index] + overhead) / head_dim,
        distortion=quantised_radius_distortion(
            math.exp(-frontier.loss[index]), moments.mean_square, moments.correlation
        ),
    )


def _radius_bits(head_dim: int, depth: int, coding: RadiusCoding) -> int:
    return (head_dim >> depth) * coding.bits_per_radius + coding.norm_bits


@lru_cache(maxsize=16)
def _frontiers(head_dim: int, max_rate: int, cells: CellCounts) -> tuple[DepthFrontier, ...]:
    return depth_frontiers(head_dim, max_rate, cells)
