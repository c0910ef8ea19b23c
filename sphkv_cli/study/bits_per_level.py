"""Where do bits belong? One level's bits swept at a time around a base code.

    D = sum_l 2 (G_(l-1) - G_l) + radius part      each level's share of the unit-gain D

(closed form, distortion.py) beside measured errors, and with --model the copy-back recall of a
cache in that code: digits stated in a context that come back.  A level costs its bits times
2^-level per coordinate, so a bit at level 1 costs as much as eight at level 4.
Source: ours; base code 4/2/2/2 as PolarQuant, arXiv 2502.02617, with 2-bit radii.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sphkv_cli.blocks import Table
from sphkv_cli.errors import UsageError
from sphkv_cli.evaluation.coding import KeyValueCoding
from sphkv_cli.evaluation.copy_back import copy_back_prompts, copy_back_recall
from sphkv_cli.evaluation.recall_prompts import RecallPrompt
from sphkv_cli.plots.figures import Figure, Panel, PlotPanel, Series
from sphkv_cli.study.coded_cache import (
    coding_of,
    errors_of,
    judged_on,
    protocol_condition,
    study_frames,
)
from sphkv_cli.study.coding_errors import CodingErrors
from sphkv_cli.study.inputs import StudyInputs
from sphkv_cli.study.result import StudyResult
from sphkv_codebooks.distortion import distortion_shares
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode

BASE_BITS = (4, 2, 2, 2)
BASE_RADIUS_BITS = 2
LEVEL_1_BITS = (1, 2, 3, 4, 5, 6)
UPPER_BITS = (0, 1, 2, 3, 4)
RADIUS_BITS = (1, 2, 3, 4)
RADII = "radii"
_PROMPT_TOKENS = 512


@dataclass(frozen=True)
class SweptCode:
    """part: "level 1" ... or "radii", whose bits are not the base's (the base is in every part)."""

    part: str
    bits: int
    code: SphericalCode

    @property
    def is_base(self) -> bool:
        """Whether nothing was changed."""
        return self.bits == (BASE_RADIUS_BITS if self.part == RADII else base_bits(self.part))

    @property
    def share(self) -> float:
        """Of this part in the predicted unit-gain D."""
        shares = distortion_shares(self.code)
        if self.part == RADII:
            return shares.radius / shares.total
        return shares.levels[int(self.part.split()[1]) - 1] / shares.total


def base_bits(part: str) -> int:
    """Bits of a level in the base code."""
    return BASE_BITS[int(part.split()[1]) - 1]


def swept_codes(head_dim: int) -> list[SweptCode]:
    """All codes, part by part.

    Raises:
        UsageError: head_dim is too small for blocks of 16 with radii of their own.
    """
    if head_dim < 2 ** (len(BASE_BITS) + 1):
        raise UsageError(
            f"bits-per-level sweeps blocks of 16 coordinates, head_dim {head_dim} has no two",
            "take a model with head_dim 32 or more",
        )

    def code(bits: Sequence[int], radius_bits: int) -> SphericalCode:
        name = f"{'/'.join(map(str, bits))}:r{radius_bits}"
        return SphericalCode.analytic(name, head_dim, tuple(bits), f"lloyd_max:{radius_bits}")

    found = []
    for level in range(1, len(BASE_BITS) + 1):
        for swept in LEVEL_1_BITS if level == 1 else UPPER_BITS:
            bits = [*BASE_BITS]
            bits[level - 1] = swept
            found.append(SweptCode(f"level {level}", swept, code(bits, BASE_RADIUS_BITS)))
    found += [SweptCode(RADII, bits, code(BASE_BITS, bits)) for bits in RADIUS_BITS]
    return found


@dataclass(frozen=True)
class SweptRow:
    """recall: copy-back digit accuracy, NaN where the model was not asked."""

    swept: SweptCode
    errors: CodingErrors
    recall: float


def run(inputs: StudyInputs) -> StudyResult:
    """The study; recall only with --model, as it runs the model."""
    capture = inputs.require_capture()
    swept = swept_codes(capture.head_dim)
    rotation = Rotation("hadamard", capture.head_dim, inputs.seed)
    frames = study_frames(inputs, rotation, is_centred=True)
    # The base stands in every part: it is measured once.
    codings = {s.code.digest: coding_of(inputs, s.code, frames, "") for s in swept}
    inputs.progress.start("Coding", len(inputs.layers()), "layers")
    errors = dict(zip(codings, errors_of(inputs, list(codings.values())), strict=True))
    recall, asked = _recall(inputs, codings)
    rows = [SweptRow(s, errors[s.code.digest], recall[s.code.digest]) for s in swept]
    return StudyResult(
        tables=(_table(rows),),
        figures=(_figure(rows),),
        reading=_reading(rows, recall.get("dense", math.nan)),
        conditions=(judged_on(inputs), protocol_condition(), asked),
    )


def _recall(
    inputs: StudyInputs, codings: Mapping[str, KeyValueCoding]
) -> tuple[dict[str, float], str]:
    """Digit accuracy per code and "dense", and the sentence that says how it was asked."""
    n_prompts = inputs.options.recall_prompts
    if inputs.model is None or not n_prompts:
        return dict.fromkeys(codings, math.nan), (
            "Copy-back recall was not measured: it runs the model, name it with --model."
        )
    prompts = _prompts(inputs, n_prompts)
    model = inputs.judged_model
    inputs.progress.start("Recall", (1 + len(codings)) * n_prompts, "prompts")
    dense = copy_back_recall(model, None, prompts, progress=inputs.progress)
    found = {"dense": dense.digit_accuracy.mean}
    for digest, coding in codings.items():
        score = copy_back_recall(model, coding, prompts, progress=inputs.progress)
        found[digest] = score.digit_accuracy.mean
    usable = "" if dense.is_usable_control else " (too little for the probe to prove anything)"
    return found, (
        f"Copy-back: {n_prompts} prompts of {prompts[0].n_context} tokens coded whole, digits "
        f"right; the dense model gets {dense.digit_accuracy.mean:.0%}{usable}."
    )


def _prompts(inputs: StudyInputs, n_prompts: int) -> tuple[RecallPrompt, ...]:
    from sphkv_cli.evaluation.recall_prompts import PromptShape, encoder_of, start_tokens
    from sphkv_cli.models.load import load_tokenizer
    from sphkv_cli.models.source import resolve_model

    capture = inputs.require_capture()
    tokenizer = load_tokenizer(resolve_model(inputs.model or capture.model))
    filler = [int(t) for d in inputs.documents("judge") for t in capture.token_ids(d)]
    shape = PromptShape(n_context=_PROMPT_TOKENS, start=start_tokens(tokenizer))
    return copy_back_prompts(
        encoder_of(tokenizer), filler, shape, n_prompts=n_prompts, seed=inputs.seed
    )


def _table(rows: Sequence[SweptRow]) -> Table:
    return Table(
        f"Around {'/'.join(map(str, BASE_BITS))}, {BASE_RADIUS_BITS}-bit radii: one part at a time",
        (
            *("part", "bits", "code rate", "D predicted", "its share of D", "D keys", "D values"),
            *("logit rms", "output error", "worst head", "recall"),
        ),
        [
            (
                row.swept.part,
                f"{row.swept.bits}{' (base)' if row.swept.is_base else ''}",
                row.swept.code.code_rate,
                row.swept.code.distortion(),
                f"{row.swept.share:.1%}",
                row.errors.key_distortion,
                row.errors.value_distortion,
                row.errors.logit_rms,
                row.errors.output_error,
                row.errors.worst_head,
                row.recall,
            )
            for row in rows
        ],
        text_columns=2,
    )


def _parts(rows: Sequence[SweptRow]) -> dict[str, list[SweptRow]]:
    found: dict[str, list[SweptRow]] = {}
    for row in rows:
        found.setdefault(row.swept.part, []).append(row)
    return found


def _figure(rows: Sequence[SweptRow]) -> Figure:
    def panel(
        title: str, y_label: str, values: dict[str, list[float]], *, log: bool = True
    ) -> Panel:
        series = [
            Series(
                part,
                [row.swept.code.code_rate for row in found],
                values[part],
                "both",
                emphasis=part == "level 1",
            )
            for part, found in _parts(rows).items()
        ]
        scale = "log" if log else "linear"
        return PlotPanel(title, "bits per coordinate", y_label, series, y_scale=scale)  # type: ignore[arg-type]

    parts = _parts(rows)
    panels = [
        panel(
            "Predicted", "D", {p: [r.swept.code.distortion() for r in f] for p, f in parts.items()}
        ),
        panel(
            "Measured",
            "output error",
            {p: [r.errors.output_error for r in f] for p, f in parts.items()},
        ),
        panel(
            "Share of D",
            "of the swept part",
            {p: [r.swept.share for r in f] for p, f in parts.items()},
            log=False,
        ),
    ]
    if any(math.isfinite(row.recall) for row in rows):
        recall = {p: [r.recall for r in f] for p, f in parts.items()}
        panels.append(panel("Copy-back", "digits right", recall, log=False))
    return Figure("levels", "One part of the code swept at a time around the base.", panels)


def _reading(rows: Sequence[SweptRow], dense_recall: float) -> tuple[str, str]:
    base = next(row for row in rows if row.swept.is_base)
    fewer = {
        row.swept.part: row
        for row in rows
        if row.swept.bits
        == (BASE_RADIUS_BITS if row.swept.part == RADII else base_bits(row.swept.part)) - 1
    }

    def price(row: SweptRow) -> float:
        """Factor in output error per bit per coordinate saved."""
        saved = base.swept.code.code_rate - row.swept.code.code_rate
        return math.exp(math.log(row.errors.output_error / base.errors.output_error) / saved)

    prices = {part: price(row) for part, row in fewer.items()}
    dearest, cheapest = max(prices, key=prices.__getitem__), min(prices, key=prices.__getitem__)
    first = fewer["level 1"]
    recall = ""
    if math.isfinite(base.recall):
        two = next(r for r in rows if r.swept.part == "level 1" and r.swept.bits == 2)
        recall = (
            f"; copy-back recall is {base.recall:.2f} at the base, {first.recall:.2f} with one "
            f"level-1 bit fewer and {two.recall:.2f} with two (dense {dense_recall:.2f})"
        )
    return (
        f"One level-1 bit too few multiplies the output error by "
        f"{first.errors.output_error / base.errors.output_error:.2f} (level 1's share of D goes "
        f"from {base.swept.share:.0%} to {first.swept.share:.0%}){recall}.",
        f"Per bit per coordinate saved, {dearest} is the dearest place (output error times "
        f"{prices[dearest]:.2f}) and {cheapest} the cheapest (times {prices[cheapest]:.2f}); a "
        "code is balanced where these are equal.",
    )
