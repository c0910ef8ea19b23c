"""What a capture will write, in bytes, before anything runs."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sphkv_cli.artifacts.capture_info import DocumentInfo
from sphkv_cli.artifacts.capture_writer import storage_dtype
from sphkv_cli.errors import SphkvError
from sphkv_cli.models.geometry import ModelGeometry

# An upper limit of HDF5's own bookkeeping: groups, object headers and attributes, of one layer of
# one document, of one document, and of the file.
_HDF5_BYTES_PER_LAYER = 4096
_HDF5_BYTES_PER_DOCUMENT = 8192
_HDF5_BYTES = 65536


@dataclass(frozen=True)
class CapturePlan:
    """A capture that was not run: its documents and its bytes.

    `file_bytes` is the artifact; `disk_bytes` what the folder must hold meanwhile, because the
    documents' shards stay until the artifact is whole.
    """

    model: str
    architecture: str
    attention: str
    n_layers: int
    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    documents: tuple[DocumentInfo, ...]
    notes: tuple[str, ...]
    key_bytes: int
    value_bytes: int
    query_bytes: int
    pre_rope_bytes: int
    statistics_bytes: int
    file_bytes: int
    disk_bytes: int
    disk_free_bytes: int

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(document.n_tokens for document in self.documents)

    @property
    def tensor_bytes(self) -> int:
        """Keys, values, queries and keys before RoPE."""
        return self.key_bytes + self.value_bytes + self.query_bytes + self.pre_rope_bytes


def make_plan(
    *,
    model: str,
    geometry: ModelGeometry,
    attention: str,
    documents: Sequence[DocumentInfo],
    notes: tuple[str, ...],
    pre_rope: bool,
    store_dtype: str,
    folder: Path,
) -> CapturePlan:
    """Count the bytes of capturing `documents` into `folder`."""
    item = storage_dtype(store_dtype).itemsize
    n_tokens = sum(document.n_tokens for document in documents)
    n_queries = sum(document.n_queries for document in documents)
    n_fit = sum(document.split == "fit" for document in documents)
    per_token = geometry.n_layers * geometry.n_kv_heads * geometry.head_dim * item
    keys = n_tokens * per_token
    queries = n_queries * geometry.n_layers * geometry.n_q_heads * geometry.head_dim * item
    pre = keys if pre_rope else 0
    moments = geometry.n_layers * geometry.n_q_heads * geometry.head_dim * (geometry.head_dim + 1)
    statistics = 4 * (moments + geometry.n_layers * geometry.n_q_heads)
    own = len(documents) * (geometry.n_layers * _HDF5_BYTES_PER_LAYER + _HDF5_BYTES_PER_DOCUMENT)
    own += 8 * n_tokens + _HDF5_BYTES
    file_bytes = 2 * keys + queries + pre + statistics + own
    shards = 2 * keys + queries + pre + own + n_fit * 8 * moments
    return CapturePlan(
        model=model,
        architecture=geometry.architecture,
        attention=attention,
        n_layers=geometry.n_layers,
        n_q_heads=geometry.n_q_heads,
        n_kv_heads=geometry.n_kv_heads,
        head_dim=geometry.head_dim,
        documents=tuple(documents),
        notes=notes,
        key_bytes=keys,
        value_bytes=keys,
        query_bytes=queries,
        pre_rope_bytes=pre,
        statistics_bytes=statistics,
        file_bytes=file_bytes,
        disk_bytes=file_bytes + shards,
        disk_free_bytes=shutil.disk_usage(folder).free,
    )


def check_disk(plan: CapturePlan, folder: Path, *, already_bytes: int = 0) -> None:
    """Raise SphkvError unless `folder` has room for what is still to be written."""
    needed = plan.disk_bytes - already_bytes
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SphkvError(
            f"the capture needs {_readable(needed)} in {folder}, which has {_readable(free)} free "
            f"({_readable(plan.file_bytes)} stay, the rest is removed at the end)",
            "lower --max-tokens, raise --query-stride, or choose another --output",
        )


def _readable(n_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} bytes"
