"""Writes the parts of capture.h5 as FORMAT.md specifies them; the reader is in `capture.py`."""

import json
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from sphkv_cli.artifacts.bfloat16 import BFLOAT16, STORED_AS, bfloat16_bits
from sphkv_cli.artifacts.capture_info import CaptureInfo, DocumentInfo

KEY_AXES = "n_tokens, n_kv_heads, head_dim"
QUERY_AXES = "n_queries, n_q_heads, head_dim"
_LAYER_TABLE = np.dtype(
    [
        ("layer_type", "S24"),
        ("window", "<i4"),
        ("softmax_scale", "<f8"),
        ("logit_softcap", "<f8"),
    ]
)


def storage_dtype(stored_as: str) -> np.dtype[Any]:
    """The HDF5 type of stored activations: bfloat16 lives in uint16."""
    return np.dtype("<u2") if stored_as == BFLOAT16 else np.dtype(stored_as).newbyteorder("<")


def to_storage(x: npt.NDArray[np.float32], stored_as: str) -> npt.NDArray[Any]:
    """Round float32 values to the stored type; any shape."""
    return bfloat16_bits(x) if stored_as == BFLOAT16 else x.astype(storage_dtype(stored_as))


def write_capture_info(file: h5py.File, info: CaptureInfo) -> None:
    """Write the root attributes and the table of layers."""
    for name in (
        *("model", "architecture", "n_layers", "n_q_heads", "n_kv_heads", "head_dim"),
        *("model_digest", "dtype", "stored_as", "has_keys_pre_rope"),
    ):
        file.attrs[name] = getattr(info, name)
    file.attrs["rope"] = json.dumps(info.rope, sort_keys=True)
    table = np.zeros(info.n_layers, _LAYER_TABLE)
    for row, layer in zip(table, info.layers, strict=True):
        row["layer_type"] = layer.layer_type.encode()
        row["window"], row["softmax_scale"] = layer.window, layer.softmax_scale
        row["logit_softcap"] = layer.logit_softcap
    _create(file, "layers", table.shape, table.dtype, "n_layers")[...] = table


def create_document(
    parent: h5py.Group,
    name: str,
    info: CaptureInfo,
    document: DocumentInfo,
    token_ids: npt.NDArray[np.integer[Any]],
    query_positions: npt.NDArray[np.integer[Any]],
) -> h5py.Group:
    """Create the group of one document, its activations allocated and still to be written."""
    group = parent.create_group(name)
    for key in ("name", "split", "n_tokens", "source", "first_token", "text_sha256"):
        group.attrs[key] = getattr(document, key)
    for key, values, axis in (
        ("token_ids", token_ids, "n_tokens"),
        ("query_positions", query_positions, "n_queries"),
    ):
        _create(group, key, values.shape, np.dtype("<i4"), axis)[...] = values
    keys_shape = (document.n_tokens, info.n_kv_heads, info.head_dim)
    queries_shape = (document.n_queries, info.n_q_heads, info.head_dim)
    for layer in range(info.n_layers):
        place = group.create_group(layer_path(layer))
        datasets = [("keys", keys_shape, KEY_AXES), ("values", keys_shape, KEY_AXES)]
        datasets.append(("queries", queries_shape, QUERY_AXES))
        if info.has_keys_pre_rope:
            datasets.append(("keys_pre_rope", keys_shape, KEY_AXES))
        for key, shape, axes in datasets:
            dataset = _create(place, key, shape, storage_dtype(info.stored_as), axes)
            dataset.attrs[STORED_AS] = info.stored_as
    return group


def write_statistics(
    file: h5py.File,
    *,
    query_mean: npt.NDArray[np.float64],
    query_second_moment: npt.NDArray[np.float64],
    output_weight: npt.NDArray[np.float64],
) -> None:
    """Write the summaries over the fit documents and the weight of every head's output.

    Args:
        query_mean: (n_layers, n_q_heads, head_dim).
        query_second_moment: E[q q^T], not centred, (n_layers, n_q_heads, head_dim, head_dim).
        output_weight: ||W_o of the head||_F^2 / head_dim, (n_layers, n_q_heads).
    """
    for key, values, axes in (
        ("query_mean", query_mean, "n_layers, n_q_heads, head_dim"),
        ("query_second_moment", query_second_moment, "n_layers, n_q_heads, head_dim, head_dim"),
        ("output_weight", output_weight, "n_layers, n_q_heads"),
    ):
        _create(file, key, values.shape, np.dtype("<f4"), axes)[...] = values.astype(np.float32)


def write_fisher(
    file: h5py.File,
    mean: npt.NDArray[np.float64],
    standard_error: npt.NDArray[np.float64],
    *,
    n_passes: int,
) -> None:
    """Write F of every query head, (n_layers, n_q_heads), and its standard error."""
    for key, values in (("fisher", mean), ("fisher_standard_error", standard_error)):
        dataset = _create(file, key, values.shape, np.dtype("<f8"), "n_layers, n_q_heads")
        dataset[...] = values
    file["fisher"].attrs["n_passes"] = n_passes


def document_path(index: int) -> str:
    """The HDF5 path of a document: "documents/007"."""
    return f"documents/{index:03d}"


def layer_path(layer: int) -> str:
    """The HDF5 path of a layer inside a document: "layers/07"."""
    return f"layers/{layer:02d}"


def _create(
    group: h5py.Group, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], axes: str
) -> h5py.Dataset:
    dataset = group.create_dataset(name, shape=shape, dtype=dtype)
    dataset.attrs["axes"] = axes
    return dataset
