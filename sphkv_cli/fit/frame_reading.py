"""What the choice of frames says, in sentences: which, how much better, and what it costs."""

from collections.abc import Sequence

import numpy as np

from sphkv_cli.artifacts.fit_tables import FrameRow
from sphkv_cli.fit.frame_price import TIME_WEIGHT
from sphkv_codebooks.balancing import balancing_bytes
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.sink_rule import SinkRule
from sphkv_kernels.decode_cost import position_term_cost

CENTRINGS = ("none", "post_rope", "pre_rope")


def error_by_centring(rows: Sequence[FrameRow]) -> dict[str, float]:
    """Output error of one layer by centring, without balancing and with most RoPE pairs."""
    errors: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: -row.rope_pairs):
        if row.balancing == "none":
            errors.setdefault(row.centring, row.output_error)
    return errors


def read_frames(
    frames: FrameSet, sinks: SinkRule, rows: Sequence[FrameRow], note: str
) -> tuple[str, ...]:
    """Sentences for a user; note: why centring before RoPE was not tried, or empty."""
    chosen = [row for row in rows if row.is_chosen]
    sentences = [_choice(frames, rows, chosen)]
    if note:
        sentences.append(f"Only centrings after RoPE were tried: {note}.")
    if any(row.centring == "pre_rope" for row in chosen):
        sentences.append(_position_cost(chosen))
    if frames.balancing is not None:
        sentences.append(_balancing(frames, chosen))
    sentences.append(_sinks(sinks))
    hopeless = [row for row in chosen if row.worst_output_error >= 1.0]
    if hopeless:
        worst = max(hopeless, key=lambda row: row.worst_output_error)
        sentences.append(
            f"In {len(hopeless)} layers some head loses its output in every frame that was tried "
            f"(layer {worst.layer}, head {worst.worst_head}: {worst.worst_output_error:.2f} of "
            "it): code these layers finer."
        )
    return tuple(sentences)


def _choice(frames: FrameSet, rows: Sequence[FrameRow], chosen: Sequence[FrameRow]) -> str:
    layers = [
        error_by_centring([row for row in rows if row.layer == layer])
        for layer in sorted({row.layer for row in rows})
    ]
    means = []
    for kind in CENTRINGS:
        of_kind = [errors[kind] for errors in layers if kind in errors]
        if of_kind:
            means.append(f"{kind} {np.mean(of_kind):.4f}")
    final = float(np.mean([row.output_error for row in chosen]))
    return (
        f"Centring by measurement: {frames.centring_summary}. Mean squared output error of a 3-bit "
        "key code (relative, mean over layers and heads; last 32 and first 4 tokens and sinks "
        "dense; every second document as if it stood later in a text): "
        f"{', '.join(means)}; chosen frames {final:.4f}."
    )


def _position_cost(chosen: Sequence[FrameRow]) -> str:
    pairs = [row.rope_pairs for row in chosen if row.centring == "pre_rope"]
    share = float(np.mean([position_term_cost(row.rope_pairs) for row in chosen]))
    return (
        f"Centring before RoPE needs positions in {len(pairs)} layers (2 bytes per token and KV "
        "head on pages with gaps, below 65,536 tokens) and keeps "
        f"{min(pairs)} to {max(pairs)} RoPE pairs there: at most {share:.0%} more time for the "
        f"attention of a decode step over all {len(chosen)} layers on an H100. A pair is kept "
        "where the error falls by more than 6.02 dB per bit that the step would read in "
        f"{TIME_WEIGHT:g} of its time (--rope-pairs overrides)."
    )


def _balancing(frames: FrameSet, chosen: Sequence[FrameRow]) -> str:
    assert frames.balancing is not None
    kinds = {kind: sum(row.balancing == kind for row in chosen) for kind in ("diagonal", "full")}
    named = " and ".join(f"{kind} in {count}" for kind, count in kinds.items() if count)
    kibibytes = balancing_bytes(frames.balancing) / 1024
    return (
        f"Keys are balanced against queries ({named} layers): {kibibytes:.1f} KiB of tables, "
        "nothing at decode."
    )


def _sinks(sinks: SinkRule) -> str:
    if sinks.factor == 0:
        return "Keeping short keys dense as sinks does not pay for its bytes here."
    return (
        f"Sinks: keys shorter than {sinks.factor:g} of the median of their head are worth keeping "
        "dense (`evaluate` does so and counts their bytes)."
    )
