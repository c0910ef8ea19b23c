"""The designer for people: D(R) against the Gaussian limit, the measured pairs, the choice."""

import math

from sphkv_cli.artifacts.fit_tables import DesignRow
from sphkv_cli.blocks import Block, Line, Table
from sphkv_cli.fit.design_rows import DesignTables, FrontierRow
from sphkv_codebooks.search import CodeDesign

NOISE = 0.05
"""Relative difference of output errors below which a choice is called a tie."""


def design_blocks(design: DesignTables) -> tuple[Block, ...]:
    """D(R) by the formula, then one table per rate."""
    return (
        Table(
            "The best codes by the formula, isotropic vectors (D = E|x-xhat|^2/|x|^2, unit gain; "
            "limit 4^-rate)",
            (
                *("any number of cells", "whole bits", "CUDA kernel", "rate", "limit"),
                *("D any", "dB", "D whole", "dB", "D CUDA", "dB"),
            ),
            [_frontier_row(row) for row in design.frontier],
            text_columns=3,
        ),
        Line(
            f"Measured on the select documents; {design.protocol}. Names: cells (n) or bits per "
            "level, radii; ls and ub: least-squares and unbiased gain. Error: mean over layers and "
            "heads of |o^-o|^2/|o|^2; instr.: SASS instructions per coordinate."
        ),
        *(
            Table(
                f"At {rate:g} bits",
                (
                    *("keys / values", "decoder", "", "rate", "laid out", "D", "dB", "instr."),
                    *("error", "worst head", "layer, head", "logit rms"),
                ),
                [_measured_row(row) for row in design.of_rate(rate)],
                text_columns=3,
            )
            for rate in design.rates
        ),
    )


def read_design(design: DesignTables) -> tuple[str, ...]:
    """One plain sentence per rate on the choice, and one on tiers that the kernel does not read."""
    sentences = [_read_rate(rate, design.of_rate(rate)) for rate in design.rates]
    if any(row.is_chosen and not row.has_kernel_layout for row in design.rows):
        sentences.append(
            "Chosen codes that only the reference reads are tiers too: a plan with them has no "
            "speed on a GPU yet; --native-only leaves them out."
        )
    return tuple(sentences)


def _frontier_row(row: FrontierRow) -> tuple[object, ...]:
    def numbers(design: CodeDesign | None) -> tuple[object, object]:
        return (math.nan, "-") if design is None else (design.distortion, f"{design.gap_db:.2f}")

    return (
        *(FrontierRow.spec(design) for design in (row.best, row.whole_bits, row.native)),
        row.rate,
        row.limit,
        *numbers(row.best),
        *numbers(row.whole_bits),
        *numbers(row.native),
    )


def _measured_row(row: DesignRow) -> tuple[object, ...]:
    verdict = ["chosen"] * row.is_chosen + ["loses a head"] * row.is_vetoed
    return (
        _short(row.name),
        "CUDA" if row.has_kernel_layout else "reference",
        ", ".join(verdict),
        row.code_rate,
        row.laid_out_rate,
        row.predicted_distortion,
        f"{row.gap_db:.2f}",
        "-" if math.isnan(row.instructions) else f"{row.instructions:.1f}",
        row.output_error,
        row.worst_output_error,
        f"{row.worst_layer}, {row.worst_head}",
        row.logit_rms,
    )


def _short(name: str) -> str:
    short = name.replace("polar-", "").replace("/", " / ")
    return short.replace("-least-squares", " ls").replace("-unbiased", " ub")


def _read_rate(rate: float, rows: tuple[DesignRow, ...]) -> str:
    chosen = next(row for row in rows if row.is_chosen)
    native = next((row for row in rows if row.has_kernel_layout), None)
    start = f"At {rate:g} bits"
    if chosen.is_vetoed:
        return (
            f"{start} every measured code loses a head (relative output error of 1 or more): "
            f"{chosen.name} is the least bad and not recommended; ask for a larger rate."
        )
    what = (
        f"{start} {chosen.name} has the least output error, {chosen.output_error:.4g} mean squared "
        f"(worst head {chosen.worst_output_error:.2f}), at {chosen.code_rate:.3f} bits, "
        f"{chosen.laid_out_rate:.3f} laid out"
    )
    if chosen is native:
        return f"{what}; the CUDA kernel reads it."
    if native is None:
        return f"{what}; no code of this rate is read by the CUDA kernel."
    ratio = native.output_error / chosen.output_error
    lead = f"{what}, but only the reference reads it"
    if native.is_vetoed:
        return f"{lead}; the best code that the CUDA kernel reads, {native.name}, loses a head."
    if ratio < 1.0 + NOISE:
        return f"{lead}; {native.name}, which the CUDA kernel reads, is as good within {NOISE:.0%}."
    return (
        f"{lead}; the best that the CUDA kernel reads is {native.name} at {native.code_rate:.3f} "
        f"bits, with {ratio:.2f} times the error."
    )
