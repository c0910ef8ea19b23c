"""Tables of equal rows in HDF5: one dataset per column, so that any reader can plot them.

A row is a frozen dataclass of str, int, float, or a tuple of floats of one length; text is stored
as fixed-length UTF-8.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import h5py
import numpy as np

Row = TypeVar("Row")


def write_rows(parent: h5py.Group, name: str, rows: Sequence[Any], row_type: type[Any]) -> None:
    """Store `rows` of `row_type` as the group `name`, one dataset per field."""
    group = parent.create_group(name)
    group.attrs["n_rows"] = len(rows)
    for field in dataclasses.fields(row_type):
        values = [getattr(row, field.name) for row in rows]
        if any(isinstance(value, str) for value in values):
            data = np.array([value.encode() for value in values])
        else:
            data = np.asarray(values)
        axes = "n_rows" if data.ndim == 1 else "n_rows, n_entries"
        group.create_dataset(field.name, data=data).attrs["axes"] = axes


def read_rows(parent: h5py.Group, name: str, row_type: type[Row]) -> tuple[Row, ...]:
    """The inverse of `write_rows`.

    Raises:
        KeyError, ValueError, TypeError: a column is missing or of another length.
    """
    group = parent[name]
    n_rows = int(group.attrs["n_rows"])
    fields = [field.name for field in dataclasses.fields(row_type)]  # type: ignore[arg-type]
    columns: dict[str, list[Any]] = {}
    for field in fields:
        column = group[field][()]
        if column.shape[:1] != (n_rows,):
            raise ValueError(f"column {name}/{field} has shape {column.shape}, not {n_rows} rows")
        columns[field] = [_plain(value) for value in column]
    return tuple(row_type(**{field: columns[field][i] for field in fields}) for i in range(n_rows))


def _plain(value: Any) -> Any:
    """A column's entry as the Python value it was written from."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return tuple(value.tolist())
    return value.item()
