"""The designer: the best code for this model at a rate, from the formula to the measured output.

1. `sphkv_codebooks.search` finds the leaders at the rate by exact distortion (isotropic input).
2. One of them is measured with keys alone and values alone coded, under each gain: that says which
   gain to use and how far keys and values should differ in rate.
3. The leaders, and pairs of a finer key and a coarser value code, are ranked on the `select`
   documents by mean squared attention-output error; a pair that loses a head is vetoed.

The chosen pair of each rate becomes a tier, and so does the best one that the CUDA kernel reads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.fit_tables import DesignRow
from sphkv_cli.evaluation.protocol import UniformProtocol
from sphkv_cli.fit.attention_error import (
    AttentionErrors,
    CodePair,
    FloatArray,
    attention_errors,
)
from sphkv_cli.fit.candidates import laid_out_rate
from sphkv_cli.fit.design_codes import (
    GainPair,
    Leaders,
    allowed_gains,
    build_code,
    native_designs,
    rows_fit,
    split_rates,
)
from sphkv_cli.fit.design_rows import DesignTables, frontier_rows
from sphkv_cli.progress import Progress
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.search import CodeDesign, SearchSpace, best_code, gap_db
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.decode_cost import instructions_per_coordinate
from sphkv_kernels.tier import TierFormat

PAGE_SIZE = 32
VETO = 1.0
"""Relative output error of a head from which on its output is lost."""

Pair = tuple[SphericalCode, SphericalCode]


@dataclass(frozen=True)
class Design:
    """What the designer found; tiers: of the chosen pairs, by laid-out rate."""

    tables: DesignTables
    tiers: tuple[TierFormat, ...]

    @property
    def codes(self) -> tuple[SphericalCode, ...]:
        """The codes of the tiers, each once, by laid-out rate."""
        found: dict[str, SphericalCode] = {}
        for tier in self.tiers:
            for code in (tier.key_code, tier.value_code):
                assert code is not None
                found.setdefault(code.name, code)
        order = sorted(
            found.values(), key=lambda code: (laid_out_rate(code, PAGE_SIZE), code.distortion())
        )
        return tuple(order)


def design_codes(
    capture: CaptureReader,
    frames: FrameSet,
    leaders: Leaders,
    progress: Progress,
    *,
    sink_norms: FloatArray | None,
    native_only: bool = False,
    protocol: UniformProtocol | None = None,
) -> Design:
    """Measure the leaders of every rate and choose a pair of codes.

    sink_norms: (n_layers, n_kv_heads), the norm below which a key stays dense; None for none.

    Raises:
        SphkvError: no `select` document that is long enough to rank codes on.
    """
    protocol = protocol or UniformProtocol()
    head_dim = capture.head_dim

    def measured(pairs: Sequence[CodePair], title: str) -> AttentionErrors:
        return attention_errors(capture, frames, pairs, protocol, sink_norms, progress, title)

    probes = {rate: _probe_pairs(designs[0]) for rate, designs in leaders.items()}
    flat = list(dict.fromkeys(pair for pairs in probes.values() for pair in pairs))
    probe_errors = dict(
        zip(flat, measured(flat, "Probing gains").mean_squared.tolist(), strict=True)
    )
    pairs_of: dict[float, list[Pair]] = {}
    for rate, designs in leaders.items():
        found = _Probe.of(probes[rate], probe_errors, designs[0])
        pairs_of[rate] = _pairs_to_measure(head_dim, rate, designs, found, native_only)
    everything = list(dict.fromkeys(pair for pairs in pairs_of.values() for pair in pairs))
    errors = measured(everything, "Ranking codes")
    rows: list[DesignRow] = []
    tiers: dict[str, TierFormat] = {}
    for rate, pairs in pairs_of.items():
        measured_rows = [
            _row(rate, pair, errors, everything.index(pair), capture.head_dim) for pair in pairs
        ]
        chosen = choose(measured_rows)
        for row, pair in zip(measured_rows, pairs, strict=True):
            if row in (chosen, choose([r for r in measured_rows if r.has_kernel_layout])):
                tier = TierFormat.spherical(*pair)
                tiers.setdefault(tier.name, tier)
        ordered = sorted(measured_rows, key=lambda row: (row.is_vetoed, row.output_error))
        rows += [replace(row, is_chosen=int(row is chosen)) for row in ordered]
    return Design(
        tables=DesignTables(
            frontier=frontier_rows(head_dim, tuple(leaders)),
            rows=tuple(rows),
            protocol=f"{protocol.description}; sinks, {errors.dense_share:.2%} of keys, as well",
        ),
        tiers=tuple(sorted(tiers.values(), key=_tier_rate)),
    )


@dataclass(frozen=True)
class _Probe:
    """gains: the best of each operand; key_slope, value_slope: error per unit of distortion."""

    gains: GainPair
    key_slope: float
    value_slope: float

    @staticmethod
    def of(
        pairs: Sequence[CodePair], errors: dict[CodePair, float], design: CodeDesign
    ) -> "_Probe":
        def best(operand: int) -> tuple[SphericalCode, float]:
            coded = [pair for pair in pairs if pair[operand] is not None]
            pair = min(coded, key=lambda pair: errors[pair])
            code = pair[operand]
            assert code is not None
            return code, errors[pair]

        (key, key_error), (value, value_error) = best(0), best(1)
        return _Probe(
            GainPair(key.gain, value.gain),
            key_error / design.distortion,
            value_error / design.distortion,
        )


def _probe_pairs(design: CodeDesign) -> list[CodePair]:
    codes = [build_code(design, gain) for gain in allowed_gains(design)]
    return [(code, None) for code in codes] + [(None, code) for code in codes]


def _pairs_to_measure(
    head_dim: int,
    rate: float,
    designs: Sequence[CodeDesign],
    probe: _Probe,
    native_only: bool,
) -> list[Pair]:
    def pair(key: CodeDesign, value: CodeDesign) -> Pair:
        return _with_gains(key, value, probe.gains)

    found = [pair(design, design) for design in designs]
    plain = build_code(designs[0], "none")
    found.append((plain, plain))
    if not native_only:
        space = SearchSpace(head_dim)
        slopes = probe.key_slope, probe.value_slope
        for key_rate, value_rate in split_rates(rate, *slopes, head_dim):
            try:
                key = best_code(space, key_rate, rows_fit(head_dim, key_rate))
                value = best_code(space, value_rate, rows_fit(head_dim, value_rate))
                found.append(pair(key, value))
            except CodeError:  # the coarser of the two would be below every code
                continue
    native = native_designs(head_dim)
    mixed = [
        (probe.key_slope * key.distortion + probe.value_slope * value.distortion, key, value)
        for key in native
        for value in native
        if (key.rate + value.rate) / 2 <= rate + 1e-9
    ]
    mixed.sort(key=lambda entry: entry[0])
    found += [pair(key, value) for _, key, value in mixed[:2]]
    return _unique(found)


def _with_gains(key: CodeDesign, value: CodeDesign, gains: GainPair) -> Pair:
    def allowed(design: CodeDesign, gain: str) -> SphericalCode:
        known = allowed_gains(design)
        return build_code(design, known[known.index(gain)] if gain in known else "none")

    return allowed(key, gains.keys), allowed(value, gains.values)


def _unique(pairs: Sequence[Pair]) -> list[Pair]:
    """Each pair once, by the digests of its codes."""
    return list({(key.digest, value.digest): (key, value) for key, value in pairs}.values())


def _row(
    target_rate: float, pair: Pair, errors: AttentionErrors, index: int, head_dim: int
) -> DesignRow:
    key, value = pair
    rate = (key.code_rate + value.code_rate) / 2
    distortion = (key.distortion() + value.distortion()) / 2
    worst, layer, head = errors.worst_head(index)
    instructions = instructions_per_coordinate(key, value)
    return DesignRow(
        target_rate=target_rate,
        key_code=key.name,
        value_code=value.name,
        code_rate=rate,
        laid_out_rate=(laid_out_rate(key, PAGE_SIZE) + laid_out_rate(value, PAGE_SIZE)) / 2,
        has_kernel_layout=int(instructions is not None),
        predicted_distortion=distortion,
        gap_db=gap_db(distortion, rate),
        instructions=math.nan if instructions is None else instructions,
        output_error=float(errors.mean_squared[index]),
        logit_rms=errors.logit_rms(index),
        worst_output_error=worst,
        worst_layer=layer,
        worst_head=head,
        is_vetoed=int(worst >= VETO),
        is_chosen=0,
    )


def choose(rows: Sequence[DesignRow]) -> DesignRow | None:
    """Least error among those that lose no head; if all do, the one whose worst head is best."""
    kept = [row for row in rows if not row.is_vetoed]
    if kept:
        return min(kept, key=lambda row: row.output_error)
    return min(rows, key=lambda row: row.worst_output_error, default=None)


def _tier_rate(tier: TierFormat) -> tuple[float, float]:
    assert tier.key_code is not None and tier.value_code is not None
    codes = (tier.key_code, tier.value_code)
    return sum(laid_out_rate(code, PAGE_SIZE) for code in codes), codes[0].distortion()
