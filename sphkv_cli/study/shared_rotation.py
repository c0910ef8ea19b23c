"""One rotation for the whole model, or one per layer and KV head?

Both are drawn anew for every seed and judged on the same documents.  A difference counts when the
95 % interval of its mean over paired seeds (Student's t, on logarithms) leaves out zero, and it
matters when it is larger than what another seed of the shared rotation changes.  Source: ours; the
shared rotation is PolarQuant's (arXiv 2502.02617) and DRIVE's (2105.08339).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sphkv_cli.blocks import Table, counted
from sphkv_cli.evaluation.coding import CodedTokens, KeyValueCoding, ModelCacheShape
from sphkv_cli.evaluation.intervals import Interval, mean_interval
from sphkv_cli.evaluation.protocol import UniformProtocol
from sphkv_cli.plots.figures import Figure, PlotPanel, Series
from sphkv_cli.study.calibration import block_code, mean_frames
from sphkv_cli.study.coding_errors import CodingErrors, coding_errors
from sphkv_cli.study.head_coding import AnalyticBooks, HeadCoding
from sphkv_cli.study.inputs import StudyInputs
from sphkv_cli.study.result import StudyResult
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode

N_SEEDS = 6
BITS, RADIUS = (4, 2, 2, 2), "lloyd_max:2"

QUANTITIES: tuple[tuple[str, Callable[[CodingErrors], float]], ...] = (
    ("key D", lambda errors: errors.key_distortion),
    ("value D", lambda errors: errors.value_distortion),
    ("logit rms, nats", lambda errors: errors.logit_rms),
    ("output error", lambda errors: errors.output_error),
)


@dataclass(frozen=True, eq=False)
class TurnedCoding(KeyValueCoding):
    """Every (layer, KV head) turned by a Hadamard rotation of its own, keys and values alike.

    centred: frames with means and without rotation; `seed` decides all rotations.
    """

    label: str
    code_format: SphericalCode
    centred: FrameSet
    shape: ModelCacheShape
    seed: int

    @property
    def name(self) -> str:
        return self.label

    @property
    def token_group(self) -> int:
        return 1

    @cached_property
    def signs(self) -> Tensor:
        """(n_layers, n_kv_heads, head_dim) of +-1: what tells randomised Hadamards apart."""
        shape = (self.shape.n_layers, self.shape.n_kv_heads, self.shape.head_dim)
        drawn = np.random.default_rng((self.seed, 1)).integers(0, 2, shape)
        return torch.from_numpy(2.0 * drawn - 1.0)

    def code(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> CodedTokens:
        signs = self.signs[layer].to(keys)
        # One fixed rotation S after signs per head: S diag(signs_h) is a randomised Hadamard.
        common = Rotation("hadamard", self.shape.head_dim, self.seed)

        def through(vectors: Tensor) -> Tensor:
            turned = common.apply(vectors * signs)
            decoded = self.code_format.decode(self.code_format.encode(turned), turned.dtype)
            return common.apply_inverse(decoded) * signs

        centred = self.centred.keys_to_frame(layer, keys, positions)
        coded = self.centred.keys_from_frame(layer, through(centred), positions)
        return CodedTokens(coded, through(values))

    def code_rate(self, n_tokens: int) -> float:
        return self.code_format.code_rate

    def stored_bytes(self, n_tokens: int) -> int:
        return self._shared.stored_bytes(n_tokens)

    def table_bytes(self) -> int:
        # One bit per sign; the shared rotation's are counted by `_shared` already.
        return self._shared.table_bytes() + -(-self.signs.numel() // 8)

    @property
    def _shared(self) -> HeadCoding:
        books = AnalyticBooks(self.code_format)
        return HeadCoding(self.label, self.code_format, books, self.centred, self.shape)


@dataclass(frozen=True)
class Comparison:
    """One quantity: shared and per-head (n_seeds) values, paired by seed."""

    name: str
    shared: tuple[float, ...]
    per_head: tuple[float, ...]

    @property
    def ratio(self) -> Interval:
        """Per head over shared: the geometric mean over seeds and its 95 % interval."""
        logs = [math.log(b / a) for a, b in zip(self.shared, self.per_head, strict=True)]
        found = mean_interval(logs)
        return Interval(math.exp(found.mean), math.exp(found.low), math.exp(found.high))

    @property
    def seed_spread(self) -> float:
        """Standard deviation over seeds of the shared rotation, relative to the mean."""
        return float(np.std(self.shared, ddof=1) / np.mean(self.shared))

    @property
    def per_head_spread(self) -> float:
        """The same of the rotations per head."""
        return float(np.std(self.per_head, ddof=1) / np.mean(self.per_head))

    @property
    def is_different(self) -> bool:
        """Whether the interval of the ratio leaves out 1."""
        return not self.ratio.low <= 1.0 <= self.ratio.high


def run(inputs: StudyInputs) -> StudyResult:
    """Measure both kinds with `N_SEEDS` seeds on the judge documents."""
    capture = inputs.require_capture()
    shape = ModelCacheShape(capture.n_layers, capture.n_kv_heads, capture.head_dim)
    code = block_code(capture.head_dim, BITS, RADIUS)
    seeds = range(inputs.seed, inputs.seed + N_SEEDS)
    centred = mean_frames(capture, inputs.documents("fit"), Rotation("none", capture.head_dim))
    codings: list[KeyValueCoding] = []
    for seed in seeds:
        frames = FrameSet(
            Rotation("hadamard", capture.head_dim, seed),
            centred.centring,
            centred.key_mean,
            inv_freq=centred.inv_freq,
        )
        shared = HeadCoding(f"shared, seed {seed}", code, AnalyticBooks(code), frames, shape)
        codings += [shared, TurnedCoding(f"per head, seed {seed}", code, centred, shape, seed)]
    protocol = UniformProtocol()
    layers, documents = inputs.layers(), inputs.documents("judge")
    inputs.progress.start("turning by many rotations", len(layers), "layers")
    errors = coding_errors(
        capture,
        documents,
        layers,
        codings,
        protocol,
        max_queries=inputs.options.max_queries,
        progress=inputs.progress,
    )
    comparisons = compare(errors[0::2], errors[1::2])
    return StudyResult(
        tables=(_table(comparisons), _seed_table(seeds, comparisons)),
        figures=(_figure(comparisons),),
        reading=read(comparisons),
        conditions=(
            f"{code.name} ({code.code_rate:.3g} bits per coordinate, code rate) for keys and "
            f"values, Hadamard, centring {centred.centring_summary}; "
            f"{counted(len(documents), 'judge document')}, "
            f"{len(layers)} of {capture.n_layers} layers.",
            protocol.description,
        ),
    )


def compare(
    shared: Sequence[CodingErrors], per_head: Sequence[CodingErrors]
) -> tuple[Comparison, ...]:
    """Every quantity, paired by seed."""
    return tuple(
        Comparison(name, tuple(map(of, shared)), tuple(map(of, per_head)))
        for name, of in QUANTITIES
    )


def read(comparisons: Sequence[Comparison]) -> tuple[str, str]:
    """Whether a rotation per head changes the output error, and against what spread."""
    output = comparisons[-1]
    ratio, n_seeds = output.ratio, len(output.shared)
    size = f"x{ratio.mean:.3f} (95 % {ratio.low:.3f} to {ratio.high:.3f}, {n_seeds} paired seeds)"
    change = abs(ratio.mean - 1.0)
    if not output.is_different:
        first = f"One rotation per layer and head does not change the output error: {size}."
    else:
        word = "lowers" if ratio.mean < 1 else "raises"
        first = f"One rotation per layer and head {word} the output error: {size}."
    larger = "larger" if output.seed_spread > change else "smaller"
    second = (
        f"Another seed of the shared rotation changes it by {100 * output.seed_spread:.1f} % "
        f"(standard deviation; {100 * output.per_head_spread:.1f} % with rotations per head), "
        f"which is {larger} than that difference of {100 * change:.1f} %."
    )
    return first, second


def _table(comparisons: Sequence[Comparison]) -> Table:
    return Table(
        "One rotation per layer and head over one shared rotation",
        ("quantity", "shared", "per head", "ratio", "95 %", "spread of seeds", "per head"),
        [
            (
                c.name,
                float(np.mean(c.shared)),
                float(np.mean(c.per_head)),
                f"{c.ratio.mean:.4f}",
                f"{c.ratio.low:.4f}..{c.ratio.high:.4f}",
                f"{100 * c.seed_spread:.2f} %",
                f"{100 * c.per_head_spread:.2f} %",
            )
            for c in comparisons
        ],
    )


def _seed_table(seeds: Sequence[int], comparisons: Sequence[Comparison]) -> Table:
    output = comparisons[-1]
    return Table(
        "Output error by seed",
        ("seed", "shared", "per head"),
        list(zip(map(str, seeds), output.shared, output.per_head, strict=True)),
    )


def _figure(comparisons: Sequence[Comparison]) -> Figure:
    panels = []
    for comparison in comparisons:
        scale = float(np.mean(comparison.shared))
        panels.append(
            PlotPanel(
                comparison.name,
                "seed",
                "% off the mean of the shared ones",
                [
                    Series(
                        label,
                        list(range(1, len(values) + 1)),
                        [100 * (value / scale - 1) for value in values],
                        "points",
                    )
                    for label, values in (
                        ("one shared rotation", comparison.shared),
                        ("one per layer and head", comparison.per_head),
                    )
                ],
            )
        )
    return Figure("rotations", "Each seed of a shared rotation and of one per head.", panels)
