"""Which frame each layer gets, by the attention-output error that a reference code makes in it.

Chosen in turn, each by the mean over query heads of the squared relative output error times the
price of the frame in bytes and decode time (`frame_price`):

    centring    none, post_rope or pre_rope with 4, 8, 16, ... or all RoPE pairs of its mean,
    balancing   each with none and diagonal; then full
    sinks       one factor for the model, at equal rate

A candidate whose worst head has an error of 1 or more loses to one without such a head; of those
within NOISE of the best the cheapest is taken.  Ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.fit_tables import FrameRow
from sphkv_cli.errors import SphkvError
from sphkv_cli.evaluation.protocol import UniformProtocol
from sphkv_cli.fit.captured_vectors import documents_of
from sphkv_cli.fit.frame_error import LATER, LayerJudge
from sphkv_cli.fit.frame_price import frame_price
from sphkv_cli.fit.key_means import (
    LayerKeys,
    centred_key_moment,
    pooled_query_moment,
    residual_mean,
)
from sphkv_codebooks.balancing import key_query_balancing
from sphkv_codebooks.frame import Centring, FrameSet
from sphkv_codebooks.rotary import keep_strongest_pairs, kept_pairs, turning
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode

FloatArray = npt.NDArray[np.float64]

NOISE = 0.03
"""Relative difference of squared errors up to which two choices are called equal."""
SINK_FACTORS = (0.0, 0.5, 0.6, 0.7)
PAIR_COUNTS = (4, 8, 16, 32, 64)
"""Between two of them a kernel takes the time of the larger."""
CHOSEN_WITH = 0.6
"""Sink factor in place while centring, pairs and balancing are chosen."""


@dataclass(frozen=True)
class FrameRules:
    """What is measured for; "auto" of `FitOptions` becomes every choice there is.

    centrings: in order of cost; balancings: among "none", "diagonal" and "full", in order of cost;
    rope_pairs: None to choose.
    """

    centrings: tuple[Centring, ...]
    balancings: tuple[str, ...]
    rope_pairs: int | None
    protocol: UniformProtocol


@dataclass(frozen=True, eq=False)
class LayerChoice:
    """frame: of this layer alone (its layer 0), rotation included.  sink_errors, sink_fractions:
    per factor of SINK_FACTORS, in the chosen frame."""

    frame: FrameSet
    median_norm: npt.NDArray[np.float32]
    rows: tuple[FrameRow, ...]
    sink_errors: FloatArray
    sink_fractions: FloatArray


@dataclass
class _Search:
    """Measures candidates of one layer and remembers them."""

    layer: int
    judge: LayerJudge
    code: SphericalCode
    median_norm: npt.NDArray[np.float32]
    rows: list[FrameRow]

    def measure(self, frame: FrameSet, balancing: str) -> "_Tried":
        threshold = CHOSEN_WITH * torch.from_numpy(self.median_norm)
        errors = self.judge.errors(frame, self.code, [threshold])[0]
        row = FrameRow(
            layer=self.layer,
            centring=frame.centring_of(0),
            rope_pairs=frame.rope_pairs(0),
            balancing=balancing,
            output_error=float(errors.mean()),
            worst_output_error=float(np.sqrt(errors.max())),
            worst_head=int(errors.argmax()),
            is_chosen=0,
        )
        self.rows.append(row)
        return _Tried(frame, row, frame_price(frame, self.code.code_rate))


@dataclass(frozen=True, eq=False)
class _Tried:
    """A frame that was measured; price: factor that its bytes and decode time put on its error."""

    frame: FrameSet
    row: FrameRow
    price: float

    @property
    def survives(self) -> bool:
        """Whether no head loses its output."""
        return self.row.worst_output_error < 1.0

    @property
    def priced_error(self) -> float:
        """What candidates are compared by."""
        return self.row.output_error * self.price


@dataclass(frozen=True)
class _Builder:
    """Makes the frames of one layer from its fit documents."""

    capture: CaptureReader
    layer: int
    median_norm: npt.NDArray[np.float32]

    def balanced(self, frame: FrameSet, kind: str) -> FrameSet:
        """The frame with the balancing of its own centred keys."""
        if kind == "none":
            return replace(frame, balancing=None)
        key_moment = centred_key_moment(
            self.capture, self.layer, self._bare(frame), self.median_norm
        )
        query_moment = pooled_query_moment(self.capture, self.layer)
        matrix = key_query_balancing(key_moment, query_moment, diagonal=kind == "diagonal")
        return replace(frame, balancing=matrix[None])

    def with_pairs(self, frame: FrameSet, n_pairs: int) -> FrameSet:
        """A pre_rope frame that keeps n_pairs of its mean, and what is left as a constant."""
        assert frame.key_mean is not None and frame.inv_freq is not None
        longest = max(document.n_tokens for document in documents_of(self.capture, "fit"))
        diagonal = np.diagonal(pooled_query_moment(self.capture, self.layer), axis1=1, axis2=2)
        asked = np.add(*np.split(diagonal, 2, axis=-1))
        weight = turning(frame.inv_freq[0], (1 + LATER) * longest) * asked
        mean = keep_strongest_pairs(frame.key_mean, n_pairs, weight)
        fewer = replace(frame, key_mean=mean, residual_mean=None)
        residual = residual_mean(self.capture, self.layer, self._bare(fewer))
        return replace(fewer, residual_mean=residual[None])

    def _bare(self, frame: FrameSet) -> FrameSet:
        return replace(frame, balancing=None, rotation=Rotation("none", frame.head_dim))


def reference_code(head_dim: int) -> SphericalCode:
    """About 3 bits: what frames are compared with."""
    depth = min(4, head_dim.bit_length() - 1)
    bits = (4, 2, 2, 2)[:depth]
    return SphericalCode.analytic("reference", head_dim, bits, "lloyd_max:2")


def choose_layer(
    capture: CaptureReader,
    layer: int,
    keys: LayerKeys,
    inv_freq: npt.NDArray[np.float32] | None,
    rotation: Rotation,
    rules: FrameRules,
) -> LayerChoice:
    """Measure and choose the frame of one layer.

    Raises:
        SphkvError: a split without documents, NaN or Inf in the capture.
    """
    code = reference_code(capture.head_dim)
    judge = LayerJudge.read(capture, layer, rules.protocol, inv_freq)
    search = _Search(layer, judge, code, keys.median_norm, [])
    builder = _Builder(capture, layer, keys.median_norm)
    kinds = _possible(rules.balancings, capture, layer)
    # A full balancing is measured in the best centring alone, unless it is asked for.
    first = [kind for kind in kinds if kind != "full"] or list(kinds)
    tried = [
        search.measure(builder.balanced(bare, kind), kind)
        for kind in first
        for bare in (
            _frame(rotation, centring, keys, inv_freq)
            for centring in rules.centrings
            if centring != "pre_rope"
        )
    ]
    if "pre_rope" in rules.centrings:
        whole = _frame(rotation, "pre_rope", keys, inv_freq)
        tried = _with_pairs(search, builder, whole, first, tried, rules.rope_pairs)
    chosen = _cheapest(tried)
    if "full" in kinds and "full" not in first:
        full = search.measure(builder.balanced(chosen.frame, "full"), "full")
        chosen = _cheapest([chosen, full])
    thresholds = [factor * torch.from_numpy(keys.median_norm) for factor in SINK_FACTORS]
    return LayerChoice(
        frame=chosen.frame,
        median_norm=keys.median_norm,
        rows=tuple(replace(row, is_chosen=int(row is chosen.row)) for row in search.rows),
        sink_errors=judge.errors(chosen.frame, code, thresholds).mean(axis=1),
        sink_fractions=np.array([judge.sink_fraction(t) for t in thresholds]),
    )


def choose_sink_factor(choices: Sequence[LayerChoice], head_dim: int) -> float:
    """The factor with the least error at equal rate over all layers.

    A share s of dense keys costs s (16 + 16 / head_dim - R) bits more per key coordinate, its
    position included; at R bits those bits would divide the error by 4 each.
    """
    rate = reference_code(head_dim).code_rate
    errors = np.mean([choice.sink_errors for choice in choices], axis=0)
    fractions = np.mean([choice.sink_fractions for choice in choices], axis=0)
    adjusted = errors * 4.0 ** (fractions * (16 + 16 / head_dim - rate))
    within = adjusted <= (1 + NOISE) * adjusted.min()
    return SINK_FACTORS[int(np.argmax(within))]


def join_layers(choices: Sequence[LayerChoice], rotation: Rotation) -> FrameSet:
    """The frames of the whole model."""
    frames = [choice.frame for choice in choices]
    centring = tuple(frame.centring_of(0) for frame in frames)
    shape = (choices[0].median_norm.shape[0], rotation.head_dim)
    means = np.stack(
        [
            np.zeros(shape, np.float32) if frame.key_mean is None else frame.key_mean[0]
            for frame in frames
        ]
    )
    identity = np.broadcast_to(np.eye(shape[1]), (shape[0], shape[1], shape[1]))
    is_balanced = any(frame.balancing is not None for frame in frames)
    balancing = [identity if f.balancing is None else f.balancing[0] for f in frames]
    return FrameSet(
        rotation,
        centring[0] if len(set(centring)) == 1 else centring,
        means if any(kind != "none" for kind in centring) else None,
        np.stack(balancing) if is_balanced else None,
        _joined([frame.inv_freq for frame in frames], (shape[1] // 2,)),
        _joined([frame.residual_mean for frame in frames], shape),
    )


def _joined(
    parts: Sequence[npt.NDArray[np.float32] | None], shape: tuple[int, ...]
) -> npt.NDArray[np.float32] | None:
    """Arrays of one layer each, (1, *shape), as one; 0 where a layer has none."""
    if all(part is None for part in parts):
        return None
    zeros = np.zeros((1, *shape), np.float32)
    return np.concatenate([zeros if part is None else part for part in parts])


def _frame(
    rotation: Rotation,
    centring: Centring,
    keys: LayerKeys,
    inv_freq: npt.NDArray[np.float32] | None,
) -> FrameSet:
    if centring == "none":
        return FrameSet(rotation)
    if centring == "post_rope":
        return FrameSet(rotation, "post_rope", keys.post_rope[None])
    assert keys.pre_rope is not None and inv_freq is not None
    return FrameSet(rotation, "pre_rope", keys.pre_rope[None], inv_freq=inv_freq[None])


def _with_pairs(
    search: _Search,
    builder: _Builder,
    whole: FrameSet,
    kinds: Sequence[str],
    others: Sequence[_Tried],
    n_pairs: int | None,
) -> list[_Tried]:
    """The candidates in order of price: `others`, then pre_rope frames with ever more pairs.

    All pairs are measured first.  Counts whose price even that error would not win back are left
    out: they cannot be chosen.
    """
    assert whole.key_mean is not None
    all_pairs = int(kept_pairs(whole.key_mean).max())
    if n_pairs is not None and n_pairs < all_pairs:
        fixed = builder.with_pairs(whole, n_pairs)
        return [*others, *(search.measure(builder.balanced(fixed, kind), kind) for kind in kinds)]
    complete = {kind: search.measure(builder.balanced(whole, kind), kind) for kind in kinds}
    counts = [count for count in PAIR_COUNTS if count < all_pairs] if n_pairs is None else []
    fewer: list[_Tried] = []
    for count in counts:
        bare = builder.with_pairs(whole, count)
        for kind, full in complete.items():
            price = frame_price(builder.balanced(bare, kind), search.code.code_rate)
            rivals = [*others, *fewer, *complete.values()]
            best = min((r.priced_error for r in rivals if r.survives), default=np.inf)
            if price * full.row.output_error * (1 - NOISE) < best:
                fewer.append(search.measure(builder.balanced(bare, kind), kind))
    return [*others, *fewer, *complete.values()]


def _possible(kinds: tuple[str, ...], capture: CaptureReader, layer: int) -> tuple[str, ...]:
    """Without the balancings, where the capture has heads whose queries are all 0."""
    moment = pooled_query_moment(capture, layer)
    if kinds == ("none",) or (np.trace(moment, axis1=1, axis2=2) > 0).all():
        return kinds
    if "none" in kinds:
        return ("none",)
    raise SphkvError(
        f"layer {layer} has a KV head whose queries are all 0 in {capture.path}: its keys cannot "
        "be balanced against them",
        "use --balancing auto or none",
    )


def _cheapest(tried: Sequence[_Tried]) -> _Tried:
    """The first (cheapest) within NOISE of the least priced error among those that survive."""
    allowed = [candidate for candidate in tried if candidate.survives] or tried
    best = min(candidate.priced_error for candidate in allowed)
    return next(c for c in allowed if c.priced_error <= (1 + NOISE) * best)
