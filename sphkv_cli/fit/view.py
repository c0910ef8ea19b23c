"""`sphkv fit-codebooks` for people: what each code costs, level by level, and what that means."""

import math

from sphkv_cli.artifacts.fit_tables import CodeRow
from sphkv_cli.blocks import Block, Line, Table
from sphkv_cli.fit.design_view import design_blocks
from sphkv_cli.fit.frame_view import frame_table
from sphkv_cli.fit.stage import FitResult


def view(result: FitResult) -> tuple[Block, ...]:
    """The frame, the codes, their levels, the fit of the densities, verdicts, the artifact."""
    blocks: list[Block] = [
        Line(
            f"{result.model}: rotation {result.rotation} (digest {result.rotation_digest[:12]}), "
            f"centring {result.centring}; {result.n_vectors:,} keys and as many values coded with "
            f"each code in {result.elapsed_s:.1f} s"
        ),
        *((frame_table(result.tables.frames),) if result.tables.frames else ()),
        *(design_blocks(result.design) if result.design else ()),
        _code_table(result),
        _logit_table(result),
        _level_table(result),
        _share_table(result),
        _goodness_table(result),
    ]
    if result.tables.empirical:
        blocks.append(_empirical_table(result))
    blocks.extend(Line(sentence) for sentence in result.reading)
    blocks.append(Line(f"{result.output}, digest {result.digest[:12]}"))
    return tuple(blocks)


def _code_table(result: FitResult) -> Table:
    pages = "/".join(str(size) for size in result.page_sizes)
    return Table(
        f"Codes: bits per coordinate (laid out on pages of {pages} tokens), D = E|x-xhat|^2/|x|^2",
        (
            *("code", "decoder", "rate", "laid out", "D predicted", "D keys", "D raw keys"),
            *("D values", "dB over limit"),
        ),
        [
            (
                row.name,
                "CUDA" if row.has_kernel_layout else "reference",
                row.code_rate,
                _rates(row),
                row.predicted_distortion,
                row.key_distortion,
                row.raw_key_distortion,
                row.value_distortion,
                f"{row.gap_db:.2f}",
            )
            for row in result.tables.codes
        ],
        text_columns=2,
    )


def _logit_table(result: FitResult) -> Table:
    return Table(
        "Logit error of the captured queries: rms(q.e) relative to the rms of",
        ("code", "predicted", "|q||k|/sqrt d", "q.(k - mean)", "q.k", "worst head", "layer, head"),
        [
            (
                row.name,
                row.predicted_relative_logit_error,
                row.isotropic_relative_logit_error,
                row.centred_relative_logit_error,
                row.relative_logit_error,
                row.worst_relative_logit_error,
                f"{row.worst_layer}, {row.worst_head}",
            )
            for row in result.tables.codes
        ],
    )


def _level_table(result: FitResult) -> Table:
    """One row per level and number of bits in use."""
    distinct = {(row.level, row.bits): row for row in result.tables.levels if row.level}
    return Table(
        "Levels: angle MSE in rad^2, and the KS distance to the analytic density (mean of heads)",
        ("level", "bits", "MSE predicted", "MSE keys", "MSE values", "KS keys", "KS values"),
        [
            (
                row.level,
                row.bits,
                row.predicted_angle_mse_rad2,
                row.key_angle_mse_rad2,
                row.value_angle_mse_rad2,
                row.key_ks,
                row.value_ks,
            )
            for _, row in sorted(distinct.items())
        ],
    )


def _share_table(result: FitResult) -> Table:
    shares = {(row.code, row.level): row for row in result.tables.levels}
    levels = [*range(1, 1 + max(row.level for row in result.tables.levels)), 0]

    def cell(code: str, level: int) -> str:
        row = shares.get((code, level))
        return "-" if row is None else f"{row.share_of_distortion:.1%}"

    return Table(
        "Where the predicted D comes from",
        ("code", *(f"level {level}" if level else "radii" for level in levels)),
        [(row.name, *(cell(row.name, level) for level in levels)) for row in result.tables.codes],
    )


def _goodness_table(result: FitResult) -> Table:
    rows: list[tuple[object, ...]] = [
        (
            row.vectors,
            f"KS level {row.level}" + ("" if row.pairing == "adjacent" else f" ({row.pairing})"),
            row.head_ks,
            row.sampling_ks,
            row.pooled_ks,
            row.worst_ks,
            f"{row.worst_layer}, {row.worst_head}",
        )
        for row in result.tables.goodness
    ]
    rows += [
        (
            row.vectors,
            "kurtosis",
            row.mean,
            row.isotropic,
            math.nan,
            row.worst,
            f"{row.worst_layer}, {row.worst_head}",
        )
        for row in result.tables.kurtosis
    ]
    return Table(
        "Do the angles follow the analytic densities? KS distance, and kurtosis of directions",
        (
            *("vectors", "what", "mean of heads", "if exact", "all pooled", "worst head"),
            "layer, head",
        ),
        rows,
        text_columns=2,
    )


def _empirical_table(result: FitResult) -> Table:
    return Table(
        "Empirical books on documents they were not fitted on, beside the analytic ones",
        ("code", "D keys", "empirical", "D values", "empirical", "q.(k - mean)", "empirical"),
        [
            (
                row.code,
                row.key_distortion,
                row.empirical_key_distortion,
                row.value_distortion,
                row.empirical_value_distortion,
                row.centred_relative_logit_error,
                row.empirical_centred_relative_logit_error,
            )
            for row in result.tables.empirical
        ],
    )


def _rates(row: CodeRow) -> str:
    """One number where every page size gives the same."""
    distinct = dict.fromkeys(f"{rate:.4g}" for rate in row.laid_out_rates)
    return "/".join(distinct)
