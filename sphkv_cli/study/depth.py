"""How deep should the recursion go? Angles concentrate with depth and radii disappear.

    levels >= 2: sin^2(psi) ~ Beta(a, a), a = 2^(l-2);   head_dim / 2^depth radii

For each head_dim and depth the best split of a rate between angles and radii by the exact
distortion (search.py), the same with fp16 radii, and a Monte Carlo check on Gaussian vectors.
Source: PolarQuant, arXiv 2502.02617 (the transform, depth 4, fp16 radii); the rest ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sphkv_cli.blocks import Table
from sphkv_cli.plots.figures import Figure, PlotPanel, Series
from sphkv_cli.study.inputs import StudyInputs
from sphkv_cli.study.result import StudyResult
from sphkv_codebooks.density import analytic_density
from sphkv_codebooks.search import CodeDesign, SearchSpace, best_codes, gap_db, gaussian_limit
from sphkv_codebooks.spherical_code import SphericalCode

HEAD_DIMS = (64, 128, 256)
RATES = (2.0, 3.0, 4.0)
TABLE_RATE = 3.0
MAX_DEPTH = 7
N_VECTORS = 4096


@dataclass(frozen=True)
class DepthPoint:
    """The best code of one depth at a rate.

    angle_rate, radius_rate: bits per coordinate; with_fp16: D of the best code with fp16 radii,
    NaN where those alone exceed the rate.
    """

    head_dim: int
    depth: int
    design: CodeDesign
    angle_rate: float
    radius_rate: float
    with_fp16: float
    measured: float


def best_split(head_dim: int, depth: int, rate: float, generator: torch.Generator) -> DepthPoint:
    """Search one depth; Monte Carlo with `N_VECTORS` Gaussian vectors."""
    best = best_codes(SearchSpace(head_dim, depths=(depth,)), rate, 1)[0]
    plain = SearchSpace(
        head_dim, depths=(depth,), block_radii=("fp16",), full_depth_radii=("norm",)
    )
    fp16 = best_codes(plain, rate, 1)
    code = best.build("best")
    radius_bits = code.n_radii * code.radius_coding.bits_per_radius + code.radius_coding.norm_bits
    return DepthPoint(
        head_dim=head_dim,
        depth=depth,
        design=best,
        angle_rate=best.rate - radius_bits / head_dim,
        radius_rate=radius_bits / head_dim,
        with_fp16=fp16[0].distortion if fp16 else math.nan,
        measured=measured_distortion(code, generator),
    )


def measured_distortion(
    code: SphericalCode, generator: torch.Generator, n_vectors: int = N_VECTORS
) -> float:
    """E ||x - xhat||^2 / ||x||^2 over Gaussian vectors."""
    x = torch.randn(n_vectors, code.head_dim, generator=generator)
    error = (x - code.decode(code.encode(x))).square().sum(-1, dtype=torch.float64)
    return float((error / x.square().sum(-1, dtype=torch.float64)).mean())


def level_spread(level: int) -> tuple[float, float]:
    """Standard deviation and width of the middle 90 % of the level's angle, radians."""
    density = analytic_density(level)
    nodes = density.ppf((np.arange(20000) + 0.5) / 20000)
    low, high = density.ppf(np.array([0.05, 0.95]))
    return float(nodes.std()), float(high - low)


def run(inputs: StudyInputs) -> StudyResult:
    """The study; needs no capture."""
    generator = torch.Generator().manual_seed(inputs.seed)
    inputs.progress.start("Depths", len(HEAD_DIMS) * len(RATES) * MAX_DEPTH, "codes")
    points: dict[tuple[int, float], list[DepthPoint]] = {}
    for head_dim in HEAD_DIMS:
        for rate in RATES:
            points[head_dim, rate] = []
            for depth in range(1, min(MAX_DEPTH, head_dim.bit_length() - 1) + 1):
                points[head_dim, rate].append(best_split(head_dim, depth, rate, generator))
                inputs.progress.advance()
    return StudyResult(
        tables=(_spread_table(), *(_split_table(points[d, TABLE_RATE]) for d in HEAD_DIMS)),
        figures=(_figure(points),),
        reading=_reading(points),
        conditions=(
            f"D predicted is exact for isotropic vectors; D measured is {N_VECTORS} Gaussian "
            "vectors per code; rates count angles, radii and norms of one vector.",
        ),
    )


def _spread_table() -> Table:
    return Table(
        "Angle concentration: isotropic vectors of any head_dim",
        ("level", "std rad", "middle 90 % rad", "angles per 128 coordinates"),
        [(level, *level_spread(level), 128 >> level) for level in range(1, MAX_DEPTH + 1)],
        text_columns=0,
    )


def _split_table(points: Sequence[DepthPoint]) -> Table:
    return Table(
        f"head_dim {points[0].head_dim}: the best split of {TABLE_RATE:g} bits per coordinate",
        (
            *("depth", "cells per level", "radii", "angle bits", "radius bits", "rate"),
            *("D predicted", "D measured", "dB over limit", "D with fp16 radii"),
        ),
        [
            (
                p.depth,
                "/".join(str(n) for n in p.design.n_cells),
                p.design.radius,
                p.angle_rate,
                p.radius_rate,
                p.design.rate,
                p.design.distortion,
                p.measured,
                p.design.gap_db,
                p.with_fp16,
            )
            for p in points
        ],
        text_columns=3,
    )


def _figure(points: dict[tuple[int, float], list[DepthPoint]]) -> Figure:
    levels = list(range(1, MAX_DEPTH + 1))
    gaps = [
        Series(
            f"head_dim {head_dim}, {rate:g} bits",
            [p.depth for p in found],
            [gap_db(p.design.distortion, rate) for p in found],
            "both",
            emphasis=head_dim == 128,
        )
        for (head_dim, rate), found in points.items()
    ]
    at_rate = points[128, TABLE_RATE]
    depths = [p.depth for p in at_rate]
    return Figure(
        "depth",
        "Angles narrow with their level while radii disappear; the gap to the Gaussian limit says "
        "what a depth is worth at the best split.",
        (
            PlotPanel(
                "Angle concentration",
                "level",
                "radians",
                (
                    Series("std", levels, [level_spread(n)[0] for n in levels], "both"),
                    Series("middle 90 %", levels, [level_spread(n)[1] for n in levels], "both"),
                ),
                y_scale="log",
            ),
            PlotPanel("Best split: gap to 4^-R", "depth", "dB over the limit", gaps),
            PlotPanel(
                f"head_dim 128 at {TABLE_RATE:g} bits: where the bits go",
                "depth",
                "bits per coordinate",
                (
                    Series("angles", depths, [p.angle_rate for p in at_rate], "both"),
                    Series("radii and norm", depths, [p.radius_rate for p in at_rate], "both"),
                ),
            ),
            PlotPanel(
                f"head_dim 128 at {TABLE_RATE:g} bits: D",
                "depth",
                "D",
                (
                    Series(
                        "best radii", depths, [p.design.distortion for p in at_rate], "both", True
                    ),
                    Series("measured", depths, [p.measured for p in at_rate], "points"),
                    Series("fp16 radii", depths, [p.with_fp16 for p in at_rate], "both"),
                    Series("limit", depths, [gaussian_limit(TABLE_RATE)] * len(depths), "dashed"),
                ),
                y_scale="log",
            ),
        ),
    )


def _reading(points: dict[tuple[int, float], list[DepthPoint]]) -> tuple[str, str]:
    at_rate = points[128, TABLE_RATE]
    best = min(at_rate, key=lambda p: p.design.distortion)
    shallow, fourth = at_rate[0], at_rate[3]
    every = [p for found in points.values() for p in found]
    apart = max(abs(p.measured / p.design.distortion - 1.0) for p in every)
    span = max(p.design.distortion for p in at_rate) / best.design.distortion - 1.0
    return (
        f"At {TABLE_RATE:g} bits and head_dim 128 depth matters by {span:.0%} of D once radii get "
        f"their own bits: depth {best.depth} is best (D {best.design.distortion:.4f}), depth 1 has "
        f"{shallow.design.distortion:.4f}, and depth 4 with fp16 radii "
        f"{_fp16_words(fourth)}.",
        f"Closed form and Monte Carlo agree within {apart:.1%} over all {len(every)} codes; the "
        f"level's spread falls from {level_spread(1)[0]:.2f} to {level_spread(MAX_DEPTH)[0]:.3f} "
        "rad, so deep levels need few bits but there are also few of them.",
    )


def _fp16_words(point: DepthPoint) -> str:
    if math.isnan(point.with_fp16):
        return "does not fit"
    return f"{point.with_fp16:.4f} ({point.with_fp16 / point.design.distortion:.2f} times)"
