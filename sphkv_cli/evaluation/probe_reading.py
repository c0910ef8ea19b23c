"""A probe in sentences, its gates, and its tables."""

from collections.abc import Sequence

from sphkv_cli.blocks import Block, Line, Table
from sphkv_cli.evaluation.copy_back import LEAST_DENSE_ACCURACY
from sphkv_cli.evaluation.intervals import Interval
from sphkv_cli.evaluation.probe_options import ProbeOptions
from sphkv_cli.evaluation.probe_result import ProbeResult, ProbeRow
from sphkv_cli.evaluation.result import GateOutcome

_QUANTITY = "digit accuracy"


def gates_of(asked: ProbeOptions, rows: Sequence[ProbeRow]) -> tuple[GateOutcome, ...]:
    """One per row of ours, where a limit was given; a probe that proves nothing fails them all."""
    if asked.gate is None:
        return ()
    usable = rows[-1].score.is_usable_control
    return tuple(
        GateOutcome(
            row.name,
            _QUANTITY,
            asked.gate,
            row.score.digit_accuracy.mean,
            usable and row.score.digit_accuracy.mean >= asked.gate,
        )
        for row in rows
        if row.is_ours
    )


def read_probe(rows: Sequence[ProbeRow]) -> tuple[str, ...]:
    """Sentences in order of weight."""
    dense = rows[-1].score
    if not dense.is_usable_control:
        return (
            f"The dense model itself gets only {dense.digit_accuracy.mean:.2f} of the digits "
            f"(below {LEAST_DENSE_ACCURACY}): this probe proves nothing about a cache. Ask for "
            "fewer keys or shorter contexts.",
        )
    lost = [
        row for row in rows[:-1] if row.score.digit_accuracy.mean < dense.digit_accuracy.mean - 0.05
    ]
    sentences = [
        f"{row.name} ({row.score.laid_out_rate:.2f} b) loses recall: "
        f"{row.score.digit_accuracy.mean:.2f} of the digits, dense "
        f"{dense.digit_accuracy.mean:.2f}."
        for row in lost
    ]
    if not lost:
        sentences.append(
            "No row loses more than .05 of the dense model's digit accuracy "
            f"({dense.digit_accuracy.mean:.2f})."
        )
    return tuple(sentences)


def view_probe(result: ProbeResult) -> tuple[Block, ...]:
    """Header lines, the table, a grid per row of a needle, sentences, gates."""
    blocks: list[Block] = [
        Line(
            f"{result.model}, {result.kind}: {result.n_prompts} prompts of "
            f"{', '.join(map(str, result.lengths))} context tokens, {result.n_codes} codes, "
            f"{result.n_digits} digits"
        ),
        Line(result.protocol_description),
        Line(f"filler: {result.filler}"),
        Table(
            "Codes of the context that come back (95 % intervals over prompts)",
            ("code", "b laid out", "digits", "[95 %]", "whole codes", "[95 %]"),
            [_cells(row) for row in result.rows],
        ),
    ]
    blocks += [_grid(row) for row in result.rows if row.grid is not None]
    blocks += [Line(sentence) for sentence in result.reading]
    for gate in result.gates:
        verdict = "holds" if gate.holds else "FAILS"
        blocks.append(
            Line(
                f"gate {verdict}: {gate.quantity} of {gate.row} {gate.found:.4g}, "
                f"limit {gate.limit:.4g}"
            )
        )
    wrote = f"wrote {result.path}, digest {result.digest[:12]} ({result.seconds:.0f} s)"
    return (*blocks, Line(wrote))


def _cells(row: ProbeRow) -> tuple[object, ...]:
    score = row.score
    return (
        row.name,
        f"{score.laid_out_rate:.2f}",
        f"{score.digit_accuracy.mean:.3f}",
        _limits(score.digit_accuracy),
        f"{score.exact.mean:.3f}",
        _limits(score.exact),
    )


def _limits(interval: Interval) -> str:
    return "-" if interval.low != interval.low else f"{interval.low:.2f}..{interval.high:.2f}"


def _grid(row: ProbeRow) -> Table:
    grid = row.grid
    assert grid is not None
    return Table(
        f"{row.name}: digits that come back, by context length and depth of the statement",
        ("context tokens", *(f"depth {depth:g}" for depth in grid.depths)),
        [
            (str(length), *(f"{cell:.2f}" for cell in cells))
            for length, cells in zip(grid.lengths, grid.digit_accuracy, strict=True)
        ],
    )
