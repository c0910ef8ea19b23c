"""Read an artifact of any kind and describe it, without loading its large datasets."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from sphkv_cli.artifacts.damage import reading
from sphkv_cli.artifacts.header import Header
from sphkv_cli.artifacts.report import Report
from sphkv_cli.artifacts.store import open_artifact, read_header, verify_digest
from sphkv_cli.blocks import Block
from sphkv_cli.inspection.main_tables import main_tables


@dataclass(frozen=True)
class DatasetInfo:
    """One dataset, or `count` datasets of equal shape under names that differ in a number."""

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    axes: str
    n_bytes: int


@dataclass(frozen=True)
class Inspection:
    """The header, the main tables, the plain attributes and the datasets of an artifact.

    `digest_ok` is None unless the digest was recomputed.
    """

    path: str
    header: Header
    tables: tuple[Block, ...]
    attributes: Mapping[str, Any]
    datasets: tuple[DatasetInfo, ...]
    file_bytes: int
    digest_ok: bool | None


def inspect_artifact(path: Path, *, verify: bool = False) -> Inspection:
    """Describe the artifact at `path`; with `verify`, recompute its content digest.

    Raises:
        ArtifactError: missing, truncated, damaged, foreign or newer file.
    """
    if _is_json(path):
        return _inspect_report(path)
    header = read_header(path)
    with open_artifact(path, header.kind) as file, reading(path, header.kind):
        attributes = {
            key: _plain(file.attrs[key])
            for key in sorted(file.attrs)
            if key not in ("format", "kind", "version", "digest", "inputs", "provenance")
        }
        datasets = _datasets(file)
    return Inspection(
        path=str(path),
        header=header,
        tables=main_tables(path, header.kind),
        attributes=attributes,
        datasets=datasets,
        file_bytes=path.stat().st_size,
        digest_ok=verify_digest(path) if verify else None,
    )


def _is_json(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(1) == b"{"
    except OSError:
        return False


def _inspect_report(path: Path) -> Inspection:
    """A report holds no datasets; its digest is checked whenever it is opened."""
    report = Report.open(path)
    return Inspection(
        path=str(path),
        header=report.header,
        tables=main_tables(path, "report"),
        attributes={},
        datasets=(),
        file_bytes=path.stat().st_size,
        digest_ok=True,
    )


def _plain(value: Any) -> Any:
    """An attribute as JSON-able Python; JSON text is opened."""
    if isinstance(value, str) and value[:1] in "[{":
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value.tolist() if hasattr(value, "tolist") else value


def _datasets(file: h5py.File) -> tuple[DatasetInfo, ...]:
    """Datasets in order; those that differ only in numbered groups are one line with a count."""
    groups: dict[tuple[str, str, tuple[int, ...] | None], list[h5py.Dataset]] = {}

    def collect(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            pattern = "/".join("*" if part.isdigit() else part for part in name.split("/"))
            groups.setdefault((pattern, item.dtype.str, item.shape[1:]), []).append(item)

    file.visititems(collect)
    return tuple(
        DatasetInfo(
            name=pattern,
            count=len(items),
            shape=items[0].shape,
            dtype=str(items[0].attrs.get("stored_as", items[0].dtype)),
            axes=str(items[0].attrs.get("axes", "")),
            n_bytes=sum(item.nbytes for item in items),
        )
        for (pattern, _, _), items in groups.items()
    )
