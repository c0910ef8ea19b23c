"""The tables that matter most in each kind of artifact, read through the stages' own readers."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sphkv_cli.artifacts.allocation import AllocationReader
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.codebooks import CodebooksReader
from sphkv_cli.artifacts.report import Report
from sphkv_cli.blocks import Block, Line, Table, bytes_text

_REPORT_COLUMNS = (
    *("code_rate", "coded_laid_out_rate", "laid_out_rate", "logit_rmse", "attention_kl"),
    *("output_error", "kl", "kl_geometric", "kl_p99", "perplexity_ratio", "top1"),
    *("digit_accuracy", "exact"),
)
"""What is shown of each row, where the report has it."""


def main_tables(path: Path, kind: str) -> tuple[Block, ...]:
    """Tables of the artifact at `path`.

    Raises:
        ArtifactError: its content is damaged.
    """
    makers = {
        "capture": _capture,
        "codebooks": _codebooks,
        "allocation": _allocation,
        "report": _report,
    }
    return makers[kind](path)


def _capture(path: Path) -> tuple[Block, ...]:
    with CaptureReader(path) as capture:
        kinds = Counter(
            (
                layer.layer_type,
                layer.window or "all",
                layer.softmax_scale,
                layer.logit_softcap or None,
            )
            for layer in capture.layers
        )
        return (
            Table(
                "Documents",
                ("document", "split", "tokens", "queries kept"),
                [(d.name, d.split, d.n_tokens, d.n_queries) for d in capture.documents],
                text_columns=2,
            ),
            Table(
                "Layers",
                ("kind", "count", "attends to", "softmax scale", "soft cap"),
                [
                    (kind, count, window, scale, cap)
                    for (kind, window, scale, cap), count in kinds.items()
                ],
            ),
        )


def _codebooks(path: Path) -> tuple[Block, ...]:
    codebooks = CodebooksReader.open(path)
    frames, sinks = codebooks.frames, codebooks.sinks
    return (
        Line(
            f"frames: rotation {frames.rotation.kind} (digest {frames.rotation.digest[:12]}), "
            f"centring {frames.centring_summary}"
            + (", balanced" if frames.balancing is not None else "")
            + (f", sinks < {sinks.factor:g}" if sinks is not None and sinks.factor > 0 else "")
        ),
        Line("tiers: " + ", ".join(tier.name for tier in codebooks.tiers)),
        Table(
            "Codes: bits per coordinate, D = E|x-xhat|^2/|x|^2 predicted and measured",
            ("code", "decoder", "rate", "D predicted", "D keys", "D values", "dB over limit"),
            [
                (
                    row.name,
                    "CUDA" if row.has_kernel_layout else "reference",
                    row.code_rate,
                    row.predicted_distortion,
                    row.key_distortion,
                    row.value_distortion,
                    row.gap_db,
                )
                for row in codebooks.tables.codes
            ],
            text_columns=2,
        ),
    )


def _allocation(path: Path) -> tuple[Block, ...]:
    with AllocationReader(path) as allocation:
        names = ("drop", *(tier.name for tier in allocation.tiers))
        counts = np.zeros(len(names))
        plans = []
        for plan in allocation.documents:
            tiers = allocation.tier_of_token(plan).astype(np.int64)
            counts += np.bincount(tiers.ravel() + 1, minlength=len(names))
            total = sum(
                (
                    plan.codes_bytes,
                    plan.padding_bytes,
                    plan.page_table_bytes,
                    plan.positions_bytes,
                    plan.fixed_table_bytes,
                )
            )
            gap = plan.cost / plan.dual_bound - 1.0 if plan.dual_bound > 0 else float("nan")
            plans.append(
                (
                    plan.name,
                    plan.split,
                    plan.n_context,
                    bytes_text(plan.budget_bytes),
                    bytes_text(total),
                    plan.cost,
                    gap,
                    plan.policy_cost,
                )
            )
    shares = counts / max(1.0, counts.sum())
    return (
        Table(
            "Plans: laid-out bytes, predicted cost, and how far a better one can be",
            (
                *("document", "split", "context", "budget", "laid out", "cost", "gap"),
                "policy cost",
            ),
            plans,
            text_columns=2,
        ),
        Table(
            "Tokens of all layers and KV heads by tier",
            ("tier", "share"),
            [(name, f"{100 * share:.2f} %") for name, share in zip(names, shares, strict=True)],
        ),
    )


def _report(path: Path) -> tuple[Block, ...]:
    content: Mapping[str, Any] = Report.open(path).content
    stage = str(content.get("stage", "profile"))
    body = content.get("probe") or content.get(stage.replace("evaluate", "evaluation"), content)
    reading = tuple(Line(sentence) for sentence in body.get("reading", ()))
    if "tables" in body:
        return (*(Table(**table) for table in body["tables"]), *reading)
    # A row of a probe has its numbers in its score.
    rows = [row | row.get("score", {}) for row in body.get("candidates") or body.get("rows") or []]
    columns = [key for key in _REPORT_COLUMNS if rows and all(key in row for row in rows)]
    table = Table(
        f"Report of {stage}",
        ("name", *(key.replace("_", " ") for key in columns)),
        [(row["name"], *(_number(row[key]) for key in columns)) for row in rows],
    )
    return (table, *reading)


def _number(value: object) -> object:
    """A number, or the mean of an estimate with its interval."""
    return value["mean"] if isinstance(value, Mapping) else value
