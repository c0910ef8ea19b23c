"""The frames of a fit: one rotation, and per layer the centring and balancing that were measured.

What a user fixes (--centring, --balancing, --rope-pairs) is not chosen; the rest is, layer by
layer, by `frame_choice`.
"""

from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.fit_tables import FrameRow
from sphkv_cli.errors import SphkvError, UsageError
from sphkv_cli.evaluation.protocol import UniformProtocol
from sphkv_cli.fit.captured_vectors import verify
from sphkv_cli.fit.frame_choice import (
    FrameRules,
    LayerChoice,
    choose_layer,
    choose_sink_factor,
    join_layers,
)
from sphkv_cli.fit.key_means import layer_keys
from sphkv_cli.fit.layer_pool import each_layer
from sphkv_cli.fit.options import FitOptions
from sphkv_cli.fit.rope_frequencies import rope_frequencies
from sphkv_cli.progress import Progress
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.frame import Centring, FrameSet
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.sink_rule import SinkRule

CENTRINGS: tuple[Centring, ...] = get_args(Centring)
BALANCINGS = ("none", "diagonal", "full")


@dataclass(frozen=True, eq=False)
class FittedFrames:
    """frames; sinks: which keys are worth keeping dense; rows: every frame that was tried.

    note: why centring before RoPE was not among them, or empty.
    """

    frames: FrameSet
    sinks: SinkRule
    rows: tuple[FrameRow, ...]
    note: str


def fit_frames(options: FitOptions, capture: CaptureReader, progress: Progress) -> FittedFrames:
    """Measure what is left open in `options` and choose it.

    Raises:
        UsageError: more RoPE pairs than a head has.
        SphkvError: a split without documents, NaN or Inf in the capture, or --centring pre_rope
            for a model whose RoPE it cannot follow.
    """
    n_pairs = capture.head_dim // 2
    if options.rope_pairs != "auto" and options.rope_pairs > n_pairs:
        raise UsageError(
            f"--rope-pairs is {options.rope_pairs}, a head of {capture.head_dim} has {n_pairs}",
            f"give {n_pairs} or fewer, or auto",
        )
    rotation = Rotation(options.rotation, capture.head_dim, options.seed)
    frequencies, note = _frequencies(options, capture)
    rules = FrameRules(
        centrings=_centrings(options, frequencies is not None),
        balancings=_balancings(options),
        rope_pairs=None if options.rope_pairs == "auto" else int(options.rope_pairs),
        protocol=UniformProtocol(),
    )

    def choose(layer: int) -> LayerChoice:
        row = None if frequencies is None else frequencies[layer]
        keys = layer_keys(capture, layer, row)
        try:
            return choose_layer(capture, layer, keys, row, rotation, rules)
        except CodeError as error:
            raise SphkvError(f"layer {layer} cannot be coded: {error}", verify(capture)) from error

    choices = []
    progress.start("Choosing frames", capture.n_layers, "layers")
    for choice in each_layer(choose, capture.n_layers):
        choices.append(choice)
        progress.advance()
    progress.finish()
    factor = choose_sink_factor(choices, capture.head_dim)
    return FittedFrames(
        frames=join_layers(choices, rotation),
        sinks=SinkRule(np.stack([choice.median_norm for choice in choices]), factor),
        rows=tuple(row for choice in choices for row in choice.rows),
        note=note,
    )


def _frequencies(
    options: FitOptions, capture: CaptureReader
) -> tuple[npt.NDArray[np.float32] | None, str]:
    if options.centring not in ("auto", "pre_rope"):
        return None, ""
    try:
        return rope_frequencies(capture), ""
    except SphkvError as error:
        if options.centring == "pre_rope":
            raise
        return None, error.message


def _centrings(options: FitOptions, has_frequencies: bool) -> tuple[Centring, ...]:
    if options.centring == "auto":
        return CENTRINGS if has_frequencies else CENTRINGS[:2]
    return (options.centring,)


def _balancings(options: FitOptions) -> tuple[str, ...]:
    if options.balancing == "auto":
        return BALANCINGS
    return ("none",) if options.balancing == "none" else ("full",)
