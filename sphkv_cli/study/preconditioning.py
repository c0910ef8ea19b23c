"""Does a random rotation make the angles what the books assume, and what is it worth?

    x' = S x,  S none | hadamard | haar

Measured angles against the densities of isotropic vectors (KS), the errors of one code under each
rotation, and a stress test that needs no capture: one coordinate scaled 1 to 1000 times, and the
axis vectors, which attain the code's deterministic bound.
Source: PolarQuant, arXiv 2502.02617, section 3; the technique is DRIVE's, arXiv 2105.08339.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch

from sphkv_cli.artifacts.fit_tables import VectorKind
from sphkv_cli.blocks import Table
from sphkv_cli.fit.angle_statistics import (
    N_BINS,
    Counts,
    count_angles,
    ks_distances,
    ks_of_sampling,
    level_end,
)
from sphkv_cli.plots.figures import Figure, Panel, PlotPanel, Series
from sphkv_cli.study.coded_cache import (
    coding_of,
    errors_of,
    framed_chunks,
    judged_on,
    protocol_condition,
    study_frames,
)
from sphkv_cli.study.inputs import StudyInputs
from sphkv_cli.study.result import StudyResult
from sphkv_codebooks.density import analytic_density
from sphkv_codebooks.distortion import direction_bound
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation, RotationKind
from sphkv_codebooks.search import SearchSpace, best_code
from sphkv_codebooks.spherical_code import SphericalCode

RATE = 3.25
SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
ROTATIONS: tuple[RotationKind, ...] = ("none", "hadamard", "haar")
N_STRESSED = 1024
_PLOT_BINS = 64
_PLOT_LEVELS = 4


@dataclass(frozen=True)
class Angles:
    """Pooled counts (n_levels, N_BINS) of one rotation and kind; ks: mean over heads per level."""

    rotation: RotationKind
    kind: VectorKind
    counts: Counts
    ks: Sequence[float]
    n_angles: Sequence[int]


@dataclass(frozen=True)
class Stress:
    """D of Gaussian vectors with one coordinate scaled; D of the axis vectors, mean and largest."""

    rotation: RotationKind
    by_scale: tuple[float, ...]
    axis_mean: float
    axis_worst: float


def stress(code: SphericalCode, rotation: Rotation, generator: torch.Generator) -> Stress:
    """Needs no data; every rotation sees the same vectors for the same generator state."""
    x = torch.randn(N_STRESSED, code.head_dim, generator=generator)
    by_scale = []
    for scale in SCALES:
        scaled = x.clone()
        scaled[:, 5 % code.head_dim] *= scale
        by_scale.append(float(_distortion(code, rotation, scaled).mean()))
    axis = _distortion(code, rotation, torch.eye(code.head_dim))
    return Stress(rotation.kind, tuple(by_scale), float(axis.mean()), float(axis.max()))


def _distortion(code: SphericalCode, rotation: Rotation, x: torch.Tensor) -> torch.Tensor:
    framed = rotation.apply(x)
    error = (framed - code.decode(code.encode(framed))).square().sum(-1, dtype=torch.float64)
    return error / x.square().sum(-1, dtype=torch.float64)


def run(inputs: StudyInputs) -> StudyResult:
    """The study."""
    capture = inputs.require_capture()
    design = best_code(SearchSpace(capture.head_dim, "powers_of_two"), RATE)
    code = design.build(f"polar at {design.rate:.3g} bits")
    rotations = {kind: Rotation(kind, capture.head_dim, inputs.seed) for kind in ROTATIONS}
    settings = [(kind, is_centred) for kind in ROTATIONS for is_centred in (False, True)]
    frames = {s: study_frames(inputs, rotations[s[0]], is_centred=s[1]) for s in settings}
    inputs.progress.start("Counting angles", 2 * len(ROTATIONS), "histograms")
    angles = []
    for kind in ROTATIONS:
        for vectors in get_args(VectorKind):
            angles.append(_angles(inputs, kind, vectors, frames[kind, True]))
            inputs.progress.advance()
    inputs.progress.start("Coding", len(inputs.layers()), "layers")
    errors = errors_of(
        inputs, [coding_of(inputs, code, frames[s], f", {s[0]}, {s[1]}") for s in settings]
    )
    stressed = [
        stress(code, rotation, torch.Generator().manual_seed(inputs.seed))
        for rotation in rotations.values()
    ]
    error_rows = [
        (
            kind,
            "yes" if c else "no",
            e.key_distortion,
            e.value_distortion,
            e.logit_rms,
            e.output_error,
            e.worst_head,
        )
        for (kind, c), e in zip(settings, errors, strict=True)
    ]
    by_setting = dict(zip(settings, errors, strict=True))
    return StudyResult(
        tables=(
            _ks_table(angles),
            Table(
                f"One code ({code.name}, D predicted {design.distortion:.4f}) under each rotation",
                (
                    *("rotation", "centred", "D keys", "D values", "logit rms", "output error"),
                    "worst head",
                ),
                error_rows,
                text_columns=2,
            ),
            Table(
                "Stress: D of Gaussian vectors with one coordinate scaled, and of axis vectors",
                ("rotation", *(f"x{scale:g}" for scale in SCALES), "axis mean", "axis worst"),
                [(s.rotation, *s.by_scale, s.axis_mean, s.axis_worst) for s in stressed],
            ),
        ),
        figures=(_histogram_figure(angles), _stress_figure(stressed, code)),
        reading=_reading(
            angles,
            {k: by_setting[k, True].output_error for k in ROTATIONS},
            stressed,
            design.distortion,
        ),
        conditions=(
            judged_on(inputs),
            protocol_condition(),
            "Angles are those of centred keys; D of keys is relative to the centred key.",
            f"A code with a bound of {direction_bound(code.codebooks):.3f} ||x|| on its error: "
            "no vector, axis vectors included, can be worse than its square in D.",
        ),
    )


def _angles(
    inputs: StudyInputs, rotation: RotationKind, kind: VectorKind, frames: FrameSet
) -> Angles:
    counts: list[Counts] = []
    ks: list[np.ndarray] = []
    n_angles: list[int] = []
    for layer in inputs.layers():
        found = count_angles(framed_chunks(inputs, frames, layer, kind), "adjacent")
        pooled = [c.sum(axis=0) for c in found.counts]
        counts.append(np.stack(pooled))
        ks.append(
            np.array([ks_distances(c, n).mean() for n, c in enumerate(found.counts, start=1)])
        )
        n_angles = [found.n_angles(n) for n in range(1, len(pooled) + 1)]
    return Angles(rotation, kind, sum(counts[1:], counts[0]), list(np.mean(ks, axis=0)), n_angles)


def _ks_table(angles: Sequence[Angles]) -> Table:
    n_levels = len(angles[0].ks)
    rows: list[tuple[object, ...]] = [
        (a.rotation, a.kind, *(float(value) for value in a.ks)) for a in angles
    ]
    rows.append(("sampling alone", "", *(ks_of_sampling(n) for n in angles[0].n_angles)))
    return Table(
        "KS distance of angles to the density of isotropic vectors, mean over layers and heads",
        ("rotation", "vectors", *(f"level {n}" for n in range(1, n_levels + 1))),
        rows,
        text_columns=2,
    )


def _histogram_figure(angles: Sequence[Angles]) -> Figure:
    panels: list[Panel] = []
    keys = [a for a in angles if a.kind == "keys"]
    for level in range(1, min(_PLOT_LEVELS, len(keys[0].ks)) + 1):
        end = level_end(level)
        edges = np.linspace(0.0, end, _PLOT_BINS + 1)
        middles = 0.5 * (edges[1:] + edges[:-1])
        series = [
            Series(
                "density",
                middles.tolist(),
                analytic_density(level).pdf(middles).tolist(),
                "dashed",
                emphasis=True,
            )
        ]
        for a in keys:
            binned = a.counts[level - 1].reshape(_PLOT_BINS, N_BINS // _PLOT_BINS).sum(axis=1)
            height = binned / binned.sum() * _PLOT_BINS / end
            series.append(Series(a.rotation, edges[:-1].tolist(), height.tolist(), "steps"))
        panels.append(PlotPanel(f"level {level}", "angle, rad", "probability density", series))
    return Figure("angles", "Angles of centred keys, all layers pooled, and the density.", panels)


def _stress_figure(stressed: Sequence[Stress], code: SphericalCode) -> Figure:
    bound = direction_bound(code.codebooks) ** 2
    series = [Series(s.rotation, SCALES, s.by_scale, "both") for s in stressed]
    series.append(Series("bound", SCALES, [bound] * len(SCALES), "dashed"))
    panel = PlotPanel("One coordinate scaled", "factor", "D", series, x_scale="log", y_scale="log")
    return Figure("stress", "D of Gaussian vectors whose one coordinate is scaled.", (panel,), 1)


def _reading(
    angles: Sequence[Angles],
    output: dict[RotationKind, float],
    stressed: Sequence[Stress],
    predicted: float,
) -> tuple[str, str]:
    ks = {a.rotation: float(np.mean(a.ks)) for a in angles if a.kind == "keys"}
    by_kind = {s.rotation: s for s in stressed}
    ratio = output["none"] / output["hadamard"]
    verdict = (
        f"rotating divides the output error by {ratio:.1f}"
        if ratio > 1.03
        else f"rotating does not help here (output error times {1 / ratio:.2f})"
        if ratio < 0.97
        else "rotating changes nothing here"
    )
    apart = abs(math.log(output["haar"] / output["hadamard"]))
    same = "as good as" if apart < 0.1 else "not the same as"
    worst = by_kind["none"].by_scale[-1]
    return (
        f"The keys' angles are {ks['none']:.3f} (KS, mean of levels) from the densities unrotated, "
        f"{ks['hadamard']:.3f} after Hadamard and {ks['haar']:.3f} after Haar; {verdict}, and "
        f"Hadamard is {same} Haar ({output['hadamard']:.4f} and {output['haar']:.4f}).",
        f"With one coordinate scaled {SCALES[-1]:g} times D is {worst:.4f} unrotated, "
        f"{by_kind['hadamard'].by_scale[-1]:.4f} after Hadamard and "
        f"{by_kind['haar'].by_scale[-1]:.4f} after Haar against {predicted:.4f} predicted; the "
        f"worst axis vector has {by_kind['none'].axis_worst:.3f}, "
        f"{by_kind['hadamard'].axis_worst:.3f} and {by_kind['haar'].axis_worst:.3f}.",
    )
