"""`sphkv inspect` for people."""

import json
from typing import Any

from sphkv_cli.blocks import Block, Line, Table, bytes_text
from sphkv_cli.inspection.stage import Inspection


def view(result: Inspection) -> tuple[Block, ...]:
    """Header, main tables, attributes and datasets."""
    header = result.header
    lines = [f"{result.path}: {header.kind}, format version {header.version}"]
    lines.append(f"digest      {header.digest}{_digest_note(result.digest_ok)}")
    lines += [
        f"made from   {role} {ref.file_name}, digest {ref.digest[:12]}"
        for role, ref in header.inputs.items()
    ]
    lines += [f"{key:<11} {_compact(value)}" for key, value in header.provenance.items()]
    head = (*(Line(text) for text in lines), *result.tables)
    if not result.datasets:
        return head
    return (
        *head,
        Table(
            "Attributes",
            ("name", "value"),
            [(key, _compact(value)) for key, value in result.attributes.items()],
            text_columns=2,
        ),
        Table(
            f"Datasets ({bytes_text(result.file_bytes)} on disk)",
            ("name", "axes", "type", "shape", "count", "bytes"),
            [
                (
                    dataset.name,
                    dataset.axes,
                    dataset.dtype,
                    " x ".join(map(str, dataset.shape)),
                    dataset.count,
                    bytes_text(dataset.n_bytes),
                )
                for dataset in result.datasets
            ],
            text_columns=3,
        ),
    )


def _digest_note(digest_ok: bool | None) -> str:
    if digest_ok is None:
        return ""
    return " (verified)" if digest_ok else " DOES NOT MATCH THE CONTENT: the file was changed"


def _compact(value: Any, limit: int = 160) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= limit else text[: limit - 4] + " ..."
