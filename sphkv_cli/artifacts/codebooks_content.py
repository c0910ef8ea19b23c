"""What is in codebooks.h5, and how it lies there.

A code is its JSON description, from which it is rebuilt bit for bit; the centroids beside it are
for readers without sphkv, and must agree.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from sphkv_cli.artifacts.empirical_books import (
    EmpiricalBooks,
    read_empirical_books,
    write_empirical_books,
)
from sphkv_cli.artifacts.fit_tables import (
    CodeRow,
    DesignRow,
    EmpiricalRow,
    FitTables,
    FrameRow,
    GoodnessRow,
    KurtosisRow,
    LevelRow,
)
from sphkv_cli.artifacts.frames import read_frames, write_frames
from sphkv_cli.artifacts.reader import write_array
from sphkv_cli.artifacts.row_tables import read_rows, write_rows
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.sink_rule import SinkRule
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.tier import TierFormat

FloatArray = npt.NDArray[np.float64]

_TABLES: Mapping[str, type[Any]] = {
    "codes": CodeRow,
    "levels": LevelRow,
    "goodness": GoodnessRow,
    "kurtosis": KurtosisRow,
    "empirical": EmpiricalRow,
    "frames": FrameRow,
    "design": DesignRow,
}
_LATER_TABLES = ("frames", "design")
"""Not in files of version 1."""
_COUNTS = ("n_layers", "n_q_heads", "n_kv_heads", "head_dim")

MEASURES = {
    "key_distortion": "n_codes, n_layers, n_kv_heads",
    "value_distortion": "n_codes, n_layers, n_kv_heads",
    "centred_relative_logit_error": "n_codes, n_layers, n_kv_heads",
    "kept_key_energy": "n_layers, n_kv_heads",
}
"""Arrays under `measured`, and their axes."""


@dataclass(frozen=True)
class ModelShape:
    """The model that the frames belong to."""

    model: str
    model_digest: str
    n_layers: int
    n_q_heads: int
    n_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class CodebooksContent:
    """Everything in codebooks.h5 but its header.

    codes and tiers in order of laid-out rate; every tier's codes are among `codes`.
    measured: per head, on the `select` documents; the names and axes of `MEASURES`.
    """

    shape: ModelShape
    frames: FrameSet
    codes: tuple[SphericalCode, ...]
    tiers: tuple[TierFormat, ...]
    page_sizes: tuple[int, ...]
    tables: FitTables
    measured: Mapping[str, FloatArray]
    empirical: EmpiricalBooks | None = None
    sinks: SinkRule | None = None

    def __post_init__(self) -> None:
        shape = self.shape
        for owner, head_dim in (
            ("the rotation", self.frames.head_dim),
            *((f"code {code.name}", code.head_dim) for code in self.codes),
        ):
            if head_dim != shape.head_dim:
                raise ValueError(f"{owner} has head_dim {head_dim}, the model {shape.head_dim}")
        heads = (shape.n_layers, shape.n_kv_heads)
        mean, balancing = self.frames.key_mean, self.frames.balancing
        for name, array in (
            ("key means", mean),
            ("balancing", balancing),
            ("sink norms", None if self.sinks is None else self.sinks.median_norm),
        ):
            if array is not None and array.shape[:2] != heads:
                raise ValueError(f"{name} of shape {array.shape} for {shape}")
        names = [code.name for code in self.codes]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"codes need distinct names, got {names}")
        for tier in self.tiers:
            if tier.key_code not in self.codes or tier.value_code not in self.codes:
                raise ValueError(f"tier {tier.name} has a code that is not in the list")
        if [row.name for row in self.tables.codes] != names:
            raise ValueError("the table of codes does not list the codes in order")
        lengths = {
            "n_codes": len(names),
            "n_layers": shape.n_layers,
            "n_kv_heads": shape.n_kv_heads,
        }
        for name, axes in MEASURES.items():
            if self.measured[name].shape != tuple(lengths[axis] for axis in axes.split(", ")):
                raise ValueError(f"measured/{name} has shape {self.measured[name].shape}")


def write_content(file: h5py.File, content: CodebooksContent) -> None:
    """Fill the file of a new artifact."""
    shape = content.shape
    for name in ("model", "model_digest", *_COUNTS):
        file.attrs[name] = getattr(shape, name)
    file.attrs["page_sizes"] = np.asarray(content.page_sizes, dtype="<i8")
    file.attrs["tiers"] = json.dumps([_tier_codes(tier) for tier in content.tiers], sort_keys=True)
    write_frames(file, content.frames)
    if content.sinks is not None:
        sinks = file.create_group("sinks")
        sinks.attrs["factor"] = content.sinks.factor
        write_array(sinks, "median_norm", content.sinks.median_norm, "n_layers, n_kv_heads")
    codes = file.create_group("codes")
    for index, code in enumerate(content.codes):
        _write_code(codes.create_group(f"{index:03d}"), code)
    measured = file.create_group("measured")
    for name, axes in MEASURES.items():
        write_array(measured, name, content.measured[name], axes)
    tables = file.create_group("tables")
    for name, row_type in _TABLES.items():
        write_rows(tables, name, getattr(content.tables, name), row_type)
    if content.empirical is not None:
        write_empirical_books(file, content.empirical)


def read_content(file: h5py.File) -> CodebooksContent:
    """The inverse of `write_content`.

    Raises:
        KeyError, ValueError, TypeError, OSError: something is missing, of another shape, or
            contradicts itself.
    """
    attrs = file.attrs
    shape = ModelShape(
        model=str(attrs["model"]),
        model_digest=str(attrs["model_digest"]),
        **{name: int(attrs[name]) for name in _COUNTS},
    )
    groups = file["codes"]
    codes = tuple(_read_code(groups[name]) for name in sorted(groups, key=int))
    by_name = {code.name: code for code in codes}
    empirical = None
    if "empirical" in file:
        empirical = read_empirical_books(file, codes, shape.n_layers, shape.n_kv_heads)
    return CodebooksContent(
        shape=shape,
        frames=read_frames(file, shape.head_dim),
        codes=codes,
        tiers=tuple(
            TierFormat.spherical(by_name[tier["key_code"]], by_name[tier["value_code"]])
            for tier in json.loads(attrs["tiers"])
        ),
        page_sizes=tuple(int(size) for size in attrs["page_sizes"]),
        tables=FitTables(
            **{
                name: read_rows(file["tables"], name, row)
                for name, row in _TABLES.items()
                if name not in _LATER_TABLES or name in file["tables"]
            }
        ),
        measured={name: file[f"measured/{name}"][()] for name in MEASURES},
        empirical=empirical,
        sinks=_read_sinks(file),
    )


def _read_sinks(file: h5py.File) -> SinkRule | None:
    """None in files of version 1."""
    if "sinks" not in file:
        return None
    group = file["sinks"]
    return SinkRule(group["median_norm"][()], float(group.attrs["factor"]))


def _tier_codes(tier: TierFormat) -> dict[str, str]:
    if tier.key_code is None or tier.value_code is None:
        raise ValueError(f"tier {tier.name} has no codes")
    return {
        "name": tier.name,
        "key_code": tier.key_code.name,
        "value_code": tier.value_code.name,
    }


def _write_code(group: h5py.Group, code: SphericalCode) -> None:
    group.attrs["name"] = code.name
    group.attrs["digest"] = code.digest
    text = json.dumps(code.describe(), sort_keys=True, allow_nan=False).encode()
    write_array(group, "description", np.array(text), "")
    for book in code.codebooks:
        write_array(group, f"level_{book.level}/centroids", book.centroids, "n_cells")
        write_array(group, f"level_{book.level}/thresholds", book.thresholds, "n_thresholds")


def _read_code(group: h5py.Group) -> SphericalCode:
    code = SphericalCode.from_description(json.loads(group["description"][()]))
    if code.digest != group.attrs["digest"]:
        raise ValueError(f"code {code.name} is not the one whose digest is recorded")
    for book in code.codebooks:
        for name, expected in (("centroids", book.centroids), ("thresholds", book.thresholds)):
            if not np.array_equal(group[f"level_{book.level}/{name}"][()], expected):
                raise ValueError(f"code {code.name}: {name} of level {book.level} contradict it")
    return code
