"""`sphkv capture` for people."""

from collections.abc import Sequence

from sphkv_cli.artifacts.capture_info import SPLITS, DocumentInfo
from sphkv_cli.blocks import Block, Line, Table, bytes_text
from sphkv_cli.capture.plan import CapturePlan
from sphkv_cli.capture.result import CaptureResult


def view(result: CaptureResult | CapturePlan) -> tuple[Block, ...]:
    """The model, the documents by split, and the bytes."""
    head = Line(
        f"{result.model} ({result.architecture}): {result.n_layers} layers, "
        f"{result.n_q_heads} query heads, {result.n_kv_heads} KV heads, head_dim {result.head_dim}"
    )
    notes = tuple(Line(f"note: {note}") for note in result.notes)
    if isinstance(result, CapturePlan):
        return (head, _documents(result.documents), *notes, *_plan_lines(result))
    made = f"{result.tokens_per_s:,.0f} tokens/s" if result.tokens_per_s else "nothing left to run"
    resumed = (
        f", {result.n_resumed_documents} documents resumed" if result.n_resumed_documents else ""
    )
    return (
        head,
        _documents(result.documents),
        *notes,
        Line(f"captured {result.n_tokens:,} tokens in {result.forward_s:.1f} s ({made}{resumed})"),
        Line(
            f"wrote {result.path}: {bytes_text(result.file_bytes)} for "
            f"{bytes_text(result.tensor_bytes)} of tensors, digest {result.digest[:12]}"
        ),
    )


def _documents(documents: Sequence[DocumentInfo]) -> Table:
    rows = []
    for split in SPLITS:
        chosen = [document for document in documents if document.split == split]
        rows.append(
            (
                split,
                ", ".join(dict.fromkeys(document.source for document in chosen)),
                len(chosen),
                f"{sum(document.n_tokens for document in chosen):,}",
                f"{sum(document.n_queries for document in chosen):,}",
            )
        )
    columns = ("split", "from", "documents", "tokens", "queries kept")
    return Table("Documents (fitting, selecting and judging share none)", columns, rows, 2)


def _plan_lines(plan: CapturePlan) -> tuple[Block, ...]:
    parts = [
        ("keys", plan.key_bytes),
        ("values", plan.value_bytes),
        ("queries", plan.query_bytes),
        ("keys before RoPE", plan.pre_rope_bytes),
        ("query statistics", plan.statistics_bytes),
        ("the file", plan.file_bytes),
        ("on disk while it runs", plan.disk_bytes),
        ("free on the disk", plan.disk_free_bytes),
    ]
    rows = [(what, f"{n_bytes:,}", bytes_text(n_bytes)) for what, n_bytes in parts]
    return (
        Table("Bytes", ("what", "bytes", ""), rows),
        Line("dry run: nothing was run and nothing was written"),
    )
