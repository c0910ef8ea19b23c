"""`sphkv profile` for people: verdicts, what each candidate costs, where the plan is worst."""

from dataclasses import fields

import numpy as np

from sphkv_cli.blocks import Block, Line, Table, bytes_text, counted
from sphkv_cli.profile.result import CandidateReport, ProfileReport, SpeedReport, WorstHead

_N_WORST = 6


def view(report: ProfileReport) -> tuple[Block, ...]:
    """Blocks in the order a reader needs them."""
    content = report.content
    n_queries = sum(document.n_queries for document in content.documents)
    where = "accuracy only" if content.accuracy_only else content.device
    head = (
        f"{content.model}: {counted(len(content.documents), 'judge document')}, "
        f"{n_queries} queries after their contexts, pages of {content.page_size} tokens; "
        f"{content.backend} backend, {where}"
    )
    blocks: list[Block] = [Line(head)]
    blocks += [_candidates(content.candidates), _logits(content.candidates)]
    blocks += [_worst_heads(content.candidates[0]), _bytes(content.candidates[0])]
    if any(c.kernel is not None or c.recursion is not None for c in content.candidates):
        blocks.append(_computation(content.candidates))
    if content.speed is not None:
        blocks += [_speed(content.speed), Line(content.speed.fp8), *_term(content.speed)]
    if content.gates:
        blocks.append(_gates(report))
    blocks += [Line(sentence) for sentence in content.reading]
    blocks.append(Line(f"Report: {report.path} ({report.seconds:.0f} s)"))
    return tuple(blocks)


def _candidates(candidates: tuple[CandidateReport, ...]) -> Table:
    return Table(
        "What each costs: quantisation error against bits laid out (plan first)",
        (
            "candidate",
            "laid out b",
            "code b",
            "x bf16",
            "logit rmse",
            "attention KL",
            "output error",
            "worst output error",
        ),
        [
            (
                c.name if c.kind != "uniform" else f"all {c.name}",
                c.laid_out_rate,
                c.code_rate,
                c.bf16_ratio,
                c.logit_rmse,
                c.attention_kl,
                c.output_error,
                _at(c.worst_output_error),
            )
            for c in candidates
        ],
    )


def _logits(candidates: tuple[CandidateReport, ...]) -> Table:
    return Table(
        "Logit error in softmax units: median head, then the largest of all heads",
        ("candidate", "rmse", "expected", "predicted", "p99", "max", "bound"),
        [
            (
                c.name,
                _median(c.heads.logit_rmse),
                _median(c.heads.expected_rmse),
                _median(c.heads.predicted_rmse),
                _median(c.heads.logit_p99),
                _largest(c.heads.logit_max),
                _largest(c.heads.bound),
            )
            for c in candidates
        ],
    )


def _worst_heads(plan: CandidateReport) -> Table:
    heads = plan.heads
    order = np.argsort(-np.nan_to_num(heads.output_error), axis=None)[:_N_WORST]
    places = [tuple(int(i) for i in np.unravel_index(k, heads.output_error.shape)) for k in order]
    return Table(
        "The plan's worst heads",
        ("layer.head", "output error", "attention KL", "logit rmse", "expected", "p99", "max"),
        [
            (
                f"{layer}.{head}",
                *(
                    float(values[layer, head])
                    for values in (
                        heads.output_error,
                        heads.attention_kl,
                        heads.logit_rmse,
                        heads.expected_rmse,
                        heads.logit_p99,
                        heads.logit_max,
                    )
                ),
            )
            for layer, head in places
        ],
    )


def _bytes(plan: CandidateReport) -> Table:
    rows: list[tuple[object, ...]] = []
    for field in fields(plan.bytes):
        n_bytes = getattr(plan.bytes, field.name)
        if n_bytes:
            share = f"{100 * n_bytes / plan.laid_out_bytes:.2f} %"
            rows.append((field.name.replace("_", " "), bytes_text(n_bytes), share))
    rows.append(("total", bytes_text(plan.laid_out_bytes), "100 %"))
    return Table("The plan's bytes, all judge documents", ("purpose", "bytes", "share"), rows)


def _computation(candidates: tuple[CandidateReport, ...]) -> Table:
    rows = []
    for c in candidates:
        computed = c.kernel or c.recursion
        if computed is not None:
            rows.append(
                (
                    c.name,
                    "CUDA kernel" if c.kernel is not None else "recursion, float64",
                    _largest(computed.logit_max),
                    _largest(computed.output_error),
                    _largest(computed.lse_max),
                )
            )
    return Table(
        "Decoder against the float64 decode of the same codes, worst head",
        ("candidate", "decoder", "logit", "output, relative", "log-sum-exp"),
        rows,
        text_columns=2,
    )


def _speed(speed: SpeedReport) -> Table:
    return Table(
        f"A decode step over the plan's pages, cold L2 (reads {speed.read_gb_per_s:.0f} GB/s here)",
        (
            "batch x context",
            "step us",
            "codes",
            "metadata",
            "GB/s",
            "of read rate",
            "best bf16",
            "bf16 us",
            "speed-up",
            "fp8 us",
            "over fp8",
        ),
        [
            (
                f"{row.batch} x {row.n_context}",
                row.step_us,
                bytes_text(row.code_bytes),
                bytes_text(row.metadata_bytes),
                row.gb_per_s,
                f"{100 * row.fraction_of_read:.0f} %",
                row.baseline,
                row.baseline_us,
                row.speedup,
                "-" if row.fp8_us is None else row.fp8_us,
                "-" if row.speedup_over_fp8 is None else row.speedup_over_fp8,
            )
            for row in speed.rows
        ],
    )


def _term(speed: SpeedReport) -> list[Line]:
    """What centring before RoPE costs these pages."""
    if not speed.n_layers_with_term:
        return []
    shares = [100 * (row.step_us / row.without_term_us - 1) for row in speed.rows]
    return [
        Line(
            f"Centring before RoPE, in {speed.n_layers_with_term} of {speed.rows[0].n_layers} "
            f"layers, changes these steps by {min(shares):+.1f} to {max(shares):+.1f} %."
        )
    ]


def _gates(report: ProfileReport) -> Table:
    return Table(
        "Limits",
        ("limit on", "", "where", "value", "limit"),
        [
            (g.name, "holds" if g.passed else "FAILS", g.where, g.value, g.limit)
            for g in report.content.gates
        ],
        text_columns=3,
    )


def _at(worst: WorstHead) -> str:
    return f"{worst.value:.4g} at {worst.layer}.{worst.head}"


def _median(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    return float(np.nanmedian(values)) if np.isfinite(values).any() else float("nan")


def _largest(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    # A decoder's NaN is the largest error there is: max() keeps it.
    return float(values.max()) if not np.isnan(values).all() else float("nan")
