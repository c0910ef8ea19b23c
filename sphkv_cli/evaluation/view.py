"""What a reader of `evaluate` needs, in order."""

import math

from sphkv_cli.blocks import Block, Line, Table, counted
from sphkv_cli.evaluation.intervals import Interval
from sphkv_cli.evaluation.result import EvaluationResult, Row

_ROUNDING = 1e-6


def view(result: EvaluationResult, *, by_position: bool = False) -> tuple[Block, ...]:
    """Header lines, the table of rows, KL by position if asked for, sentences, gates."""
    blocks: list[Block] = [
        Line(
            f"{result.model}, {counted(result.n_documents, f'{result.split} document')}, "
            f"{result.n_scored} scored positions, dense perplexity {result.perplexity_dense:.2f}"
        ),
        Line(result.protocol_description),
        _table(result),
    ]
    if by_position:
        blocks.append(_positions(result))
    blocks += [Line(sentence) for sentence in result.reading]
    for gate in result.gates:
        verdict = "holds" if gate.holds else "FAILS"
        blocks.append(
            Line(
                f"gate {verdict}: {gate.quantity} of {gate.row} {gate.found:.4g}, "
                f"limit {gate.limit:.4g}"
            )
        )
    blocks.append(
        Line(f"wrote {result.path}, digest {result.digest[:12]} ({result.seconds:.0f} s)")
    )
    return tuple(blocks)


def _table(result: EvaluationResult) -> Table:
    return Table(
        "Next-token distribution against the dense run (95 % intervals over documents)",
        (
            "code",
            "b code",
            "b laid out",
            "b whole cache",
            "coded MiB",
            "KL",
            "KL geo.",
            "[95 %]",
            "KL p99",
            "perplexity x",
            "top-1",
        ),
        [_cells(row) for row in result.rows],
    )


def _cells(row: Row) -> tuple[object, ...]:
    return (
        row.name if row.n_seeds == 1 else f"{row.name} (mean of {row.n_seeds} rotations)",
        f"{row.code_rate:.2f}",
        f"{row.coded_laid_out_rate:.2f}",
        f"{row.laid_out_rate:.2f}",
        f"{_mean_bytes(row) / 2**20:.3f}",
        _small(row.kl.mean),
        _small(row.kl_geometric.mean),
        _limits(row.kl_geometric),
        _small(row.kl_p99),
        f"{row.perplexity_ratio.mean:.4f}",
        f"{row.top1.mean:.3f}",
    )


def _mean_bytes(row: Row) -> float:
    """Laid-out bytes of the coded tokens, mean over documents."""
    return sum(document.coded_bytes for document in row.documents) / len(row.documents)


def _limits(interval: Interval) -> str:
    if math.isnan(interval.low):
        return "-"
    return f"{_small(interval.low)}..{_small(interval.high)}"


def _small(value: float) -> str:
    """Four decimals, or two digits where that is nothing; below 1e-6 it is rounding, a 0."""
    if abs(value) < _ROUNDING:
        return "0"
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.1e}"


def _positions(result: EvaluationResult) -> Table:
    bins = result.rows[0].by_position
    return Table(
        "KL by position",
        ("code", *(f"{b.first}-{b.last}" for b in bins)),
        [(row.name, *(_small(b.kl) for b in row.by_position)) for row in result.rows],
    )
