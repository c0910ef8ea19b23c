"""`sphkv compare` as tables, a figure and lines."""

import math
from collections.abc import Sequence

from sphkv_cli.blocks import Block, Line, Table
from sphkv_cli.comparison.result import CompareRow, Comparison, Duel, RateStandings, Side
from sphkv_cli.plots.figures import Figure, PlotPanel, Series

SIDES: tuple[Side, ...] = ("keys", "keys and values")


def view(result: Comparison) -> tuple[Block, ...]:
    """Verdicts first, then the tables and what they hold for."""
    blocks: list[Block] = [
        Line(
            f"{result.model}: {len(result.rows)} settings on {len(result.documents)} judge "
            f"documents ({result.n_tokens:,} tokens, {result.n_queries:,} queries) in "
            f"{result.elapsed_s:.1f} s"
        )
    ]
    blocks += [Line(sentence) for sentence in result.reading]
    blocks += list(result.tables)
    blocks += [Line(sentence) for sentence in result.conditions]
    if result.output is not None:
        blocks.append(Line(f"{result.output}, digest {str(result.digest)[:12]}"))
    return tuple(blocks)


def tables_of(
    rows: Sequence[CompareRow], standings: Sequence[RateStandings], duels: Sequence[Duel]
) -> tuple[Table, ...]:
    """All tables, verdicts first; only what the options left something for."""
    per_side = [[found for found in standings if found.side == side] for side in SIDES]
    return (
        *(standings_table(found) for found in per_side if any(f.standings for f in found)),
        *((duel_table(duels),) if duels else ()),
        code_table(rows),
        attention_table(rows),
    )


def code_table(rows: Sequence[CompareRow]) -> Table:
    """What each setting stores, and what it does to vectors."""
    return Table(
        "Every setting: bits per key coordinate, and errors of vectors",
        (
            *("method", "setting", "centred", "key rate", "laid out", "D", "centred D"),
            *("value D", "seeds"),
        ),
        [
            (
                row.family,
                row.setting,
                _yes(row.is_centred),
                row.key_rate,
                row.laid_out_rate,
                row.distortion,
                row.centred_distortion,
                row.value_distortion,
                row.n_seeds,
            )
            for row in rows
        ],
        text_columns=3,
    )


def attention_table(rows: Sequence[CompareRow]) -> Table:
    """What each setting does to attention."""
    return Table(
        "Every setting: logit error (nats), attention KL (nats), relative output error",
        (
            *("setting", "centred", "rate", "logit rms", "p99", "KL", "keys", "spread"),
            *("keys, values", "worst head", "layer, head"),
        ),
        [
            (
                row.setting,
                _yes(row.is_centred),
                row.key_rate,
                row.logit_rms,
                row.logit_p99,
                row.attention_kl,
                row.key_output_error,
                "-" if math.isnan(row.seed_spread) else f"{row.seed_spread:.0%}",
                row.whole_output_error,
                row.worst_head.value,
                f"{row.worst_head.layer}, {row.worst_head.head}",
            )
            for row in rows
        ],
        text_columns=2,
    )


def standings_table(standings: Sequence[RateStandings]) -> Table:
    """One side: every method with a setting around some asked rate, best at the middle first."""
    cells = {
        (found.rate, s.label): s.output_error if s.how == "measured" else f"~{s.output_error:.4g}"
        for found in standings
        for s in found.standings
    }
    errors: dict[str, list[float]] = {}
    middle = sorted(found.rate for found in standings)[len(standings) // 2]
    for found in sorted(standings, key=lambda f: abs(f.rate - middle)):
        for s in found.standings:
            errors.setdefault(s.label, []).append(s.output_error)
    order = sorted(errors, key=lambda label: ((middle, label) not in cells, errors[label][0]))
    rates = [found.rate for found in standings]
    return Table(
        f"Output error, {standings[0].side} coded (~: interpolated)",
        ("method", *(f"{rate:g} bits" for rate in rates)),
        [(label, *(cells.get((rate, label)) for rate in rates)) for label in order],
    )


def duel_table(duels: Sequence[Duel]) -> Table:
    """Rivals at their own rates, polar at most at the same."""
    return Table(
        "At the rival's own bytes: output error of the better of centred and not",
        ("setting", "coded", "rival rate", "polar rate", "rival", "polar", "rival/polar"),
        [
            (
                f"{duel.setting}{', centred' if duel.rival_is_centred else ''}",
                duel.side,
                duel.rival_rate,
                duel.polar_rate if duel.is_level else f"{duel.polar_rate:.4g} (fewer)",
                duel.rival_error,
                duel.polar_error,
                f"{duel.ratio:.2f}",
            )
            for duel in duels
        ],
        text_columns=2,
    )


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def figure(rows: Sequence[CompareRow]) -> Figure:
    """Output error over bits, a panel per side and centring; a line per family."""
    panels = []
    for side in SIDES:
        for is_centred in (True, False):
            ladders: dict[str, list[CompareRow]] = {}
            for row in rows:
                if row.is_centred == is_centred and math.isfinite(row.error_of(side)):
                    ladders.setdefault(row.family, []).append(row)
            series = [
                Series(
                    family,
                    [row.rate_of(side) for row in ladder],
                    [row.error_of(side) for row in ladder],
                    "both",
                    emphasis=ladder[0].is_polar,
                )
                for family, ladder in ladders.items()
            ]
            if series:
                title = f"{side} coded, {'centred' if is_centred else 'uncentred'}"
                panels.append(
                    PlotPanel(
                        *(title, "bits per coordinate", "relative output error", series),
                        y_scale="log",
                    )
                )
    return Figure(
        "compare", "Attention-output error against bits, rms over layers and heads.", panels
    )
