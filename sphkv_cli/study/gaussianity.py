"""Are rotated keys and values as Gaussian as the books assume, layer by layer?

    KS         of the coordinates of the direction x/||x||, (1 + t)/2 ~ Beta((d-1)/2, (d-1)/2) on
               the sphere, mean over heads
    kurtosis   excess kurtosis of each coordinate over tokens, mean over coordinates and heads; 0
               for a Gaussian
    angles     excess kurtosis of the angles of levels 2 and up, minus that of their density

Isotropy (KS, angles) is what the books need; the kurtosis of a coordinate over tokens also sees
norms that vary, which the radius takes up.  Source: ours; densities as in PolarQuant.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from scipy import special
from torch import Tensor

from sphkv_cli.artifacts.fit_tables import VectorKind
from sphkv_cli.blocks import Table
from sphkv_cli.fit.angle_statistics import ks_of_sampling
from sphkv_cli.plots.figures import Figure, PlotPanel, Series
from sphkv_cli.study.coded_cache import framed_vectors, judged_on, study_frames
from sphkv_cli.study.inputs import StudyInputs
from sphkv_cli.study.result import StudyResult
from sphkv_codebooks.density import analytic_density
from sphkv_codebooks.polar import to_polar
from sphkv_codebooks.rotation import Rotation, RotationKind

FloatArray = npt.NDArray[np.float64]

ROTATIONS: tuple[RotationKind, ...] = ("none", "hadamard")
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Setting:
    """Which vectors: centring moves keys alone."""

    kind: VectorKind
    is_centred: bool
    rotation: RotationKind

    @property
    def label(self) -> str:
        """As tables and legends have it."""
        centred = ", centred" if self.is_centred else ""
        return f"{self.kind}{centred}, {'rotated' if self.rotation != 'none' else 'unrotated'}"


@dataclass(frozen=True)
class LayerNormality:
    """One layer, means over heads; angle_kurtosis: mean over levels 2 and up."""

    ks: float
    kurtosis: float
    angle_kurtosis: float


def sphere_ks(directions: Tensor) -> float:
    """KS distance of all coordinates (n_vectors, head_dim) of unit vectors to the sphere's law."""
    d = directions.shape[-1]
    sorted_coordinates = np.sort(directions.flatten().to(torch.float64).numpy())
    a = 0.5 * (d - 1)
    expected = special.betainc(a, a, np.clip(0.5 * (1.0 + sorted_coordinates), 0.0, 1.0))
    n = sorted_coordinates.size
    above = np.arange(1, n + 1) / n - expected
    below = expected - np.arange(n) / n
    return float(max(above.max(), below.max()))


def excess_kurtosis(x: Tensor) -> Tensor:
    """Along the first axis, (n, ...) -> (...) float64; 0 where nothing varies."""
    centred = x.to(torch.float64) - x.mean(dim=0, dtype=torch.float64)
    variance = centred.square().mean(dim=0)
    fourth = centred.square().square().mean(dim=0)
    return torch.where(variance > 0, fourth / variance.square().clamp_min(1e-300) - 3.0, 0.0)


@lru_cache
def density_kurtosis(level: int) -> float:
    """Excess kurtosis of the analytic density of a level."""
    nodes = np.linspace(0.0, math.pi / 2, 20001)
    weight = analytic_density(level).pdf(nodes)
    weight /= weight.sum()
    centred = nodes - (weight * nodes).sum()
    return float((weight * centred**4).sum() / (weight * centred**2).sum() ** 2 - 3.0)


def layer_normality(vectors: Tensor) -> LayerNormality:
    """vectors: (n_tokens, n_kv_heads, head_dim) in their frame."""
    head_dim = vectors.shape[-1]
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(_TINY)
    directions = vectors / norm
    ks = [sphere_ks(directions[:, head]) for head in range(vectors.shape[1])]
    polar = to_polar(vectors, head_dim.bit_length() - 1)
    angles = [
        float(excess_kurtosis(level_angles).mean()) - density_kurtosis(level)
        for level, level_angles in enumerate(polar.angles, start=1)
        if level >= 2
    ]
    return LayerNormality(
        ks=float(np.mean(ks)),
        kurtosis=float(excess_kurtosis(vectors).mean()),
        angle_kurtosis=float(np.mean(angles)) if angles else math.nan,
    )


def run(inputs: StudyInputs) -> StudyResult:
    """The study."""
    capture = inputs.require_capture()
    settings = [
        Setting(kind, is_centred, rotation)
        for kind, is_centred, rotation in product(get_args(VectorKind), (False, True), ROTATIONS)
        if kind == "keys" or not is_centred
    ]
    frames = {
        (rotation, is_centred): study_frames(
            inputs, Rotation(rotation, capture.head_dim, inputs.seed), is_centred=is_centred
        )
        for rotation in ROTATIONS
        for is_centred in (False, True)
    }
    layers = inputs.layers()
    inputs.progress.start("Layers", len(layers), "layers")
    found: dict[Setting, list[LayerNormality]] = {setting: [] for setting in settings}
    for layer in layers:
        for s in settings:
            vectors = framed_vectors(inputs, frames[s.rotation, s.is_centred], layer, s.kind)
            found[s].append(layer_normality(vectors))
        inputs.progress.advance()
    n_tokens = sum(d.n_tokens for d in inputs.documents("judge"))
    sampling = ks_of_sampling(n_tokens * capture.head_dim)
    return StudyResult(
        tables=(_table(found, layers),),
        figures=(_figure(found, layers, sampling),),
        reading=_reading(found, layers, sampling),
        conditions=(
            judged_on(inputs),
            f"As many independent coordinates would show a KS of {sampling:.4f}; those of a text "
            "are not independent, so that some excess is no sign of another density.",
        ),
    )


def _table(found: dict[Setting, list[LayerNormality]], layers: Sequence[int]) -> Table:
    rows: list[tuple[object, ...]] = []
    for setting, per_layer in found.items():
        worst = max(range(len(layers)), key=lambda i: per_layer[i].ks)
        rows.append(
            (
                setting.label,
                _mean([m.ks for m in per_layer]),
                per_layer[worst].ks,
                layers[worst],
                _mean([m.kurtosis for m in per_layer]),
                max(m.kurtosis for m in per_layer),
                _mean([m.angle_kurtosis for m in per_layer]),
            )
        )
    return Table(
        "Directions against the sphere, coordinates and angles against their densities",
        (
            *("vectors", "KS, mean of layers", "worst layer", "which", "excess kurtosis"),
            *("worst layer", "angles, excess over density"),
        ),
        rows,
    )


def _figure(
    found: dict[Setting, list[LayerNormality]], layers: Sequence[int], sampling: float
) -> Figure:
    def series(name: str) -> list[Series]:
        return [
            Series(
                setting.label,
                layers,
                [getattr(m, name) for m in per_layer],
                "line",
                emphasis=setting.rotation != "none" and setting.is_centred,
            )
            for setting, per_layer in found.items()
        ]

    ks = [*series("ks"), Series("independent draws", layers, [sampling] * len(layers), "dashed")]
    return Figure(
        "layers",
        "Distance from what the books assume, by layer.",
        (
            PlotPanel("Directions", "layer", "KS distance", ks, y_scale="log"),
            PlotPanel("Coordinates over tokens", "layer", "excess kurtosis", series("kurtosis")),
            PlotPanel(
                "Angles of levels 2 and up",
                "layer",
                "excess kurtosis over the density's",
                series("angle_kurtosis"),
            ),
        ),
    )


def _reading(
    found: dict[Setting, list[LayerNormality]], layers: Sequence[int], sampling: float
) -> tuple[str, str]:
    def ks(kind: VectorKind, is_centred: bool, rotation: RotationKind) -> float:
        return _mean([m.ks for m in found[Setting(kind, is_centred, rotation)]])

    best = Setting("keys", True, "hadamard")
    worst = max(range(len(layers)), key=lambda i: found[best][i].ks)
    plain, centred = ks("keys", False, "hadamard"), ks("keys", True, "hadamard")
    values = ks("values", False, "hadamard")
    kurtosis = _mean([m.kurtosis for m in found[best]])
    holds = "holds" if max(centred, values) < 0.02 else "does not quite hold"
    return (
        f"Rotation alone does not make keys isotropic: their directions keep a KS of {plain:.4f} "
        f"(unrotated {ks('keys', False, 'none'):.4f}), with centring {centred:.4f}, values "
        f"{values:.4f} (unrotated {ks('values', False, 'none'):.4f})."
        if plain > 2 * centred
        else f"Rotated keys have directions at a KS of {plain:.4f} from the sphere (unrotated "
        f"{ks('keys', False, 'none'):.4f}), with centring {centred:.4f}; values {values:.4f} "
        f"(unrotated {ks('values', False, 'none'):.4f}).",
        f"For rotated, centred keys and rotated values the assumption {holds} (KS under .02; "
        f"independent draws: {sampling:.4f}), worst in layer {layers[worst]} with "
        f"{found[best][worst].ks:.4f}; coordinates of centred keys have an excess kurtosis of "
        f"{kurtosis:.2f} over tokens.",
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
