"""allocation.h5: what to keep of every context and how precisely, and the policy behind it.

FORMAT.md specifies the file.  It is self-contained: frames, codes, tiers, quotas, the score's
definition and calibration lie in it, so that pages can be rebuilt from it and a capture alone.
The reader is lazy for the plans of documents.
"""

import dataclasses
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import numpy.typing as npt

from sphkv_cli.artifacts.capture_info import LayerInfo, Split
from sphkv_cli.artifacts.frames import read_frames, write_frames
from sphkv_cli.artifacts.header import ArtifactRef, Header, require_input
from sphkv_cli.artifacts.row_tables import read_rows, write_rows
from sphkv_cli.artifacts.store import artifact_ref, create_artifact, open_artifact, read_header
from sphkv_cli.errors import ArtifactError
from sphkv_codebooks.frame import FrameSet
from sphkv_kernels.tier import TierFormat

FloatArray = npt.NDArray[np.float64]

PLAN_AXES = "n_layers, n_kv_heads, n_context"


@dataclass(frozen=True)
class AllocationInfo:
    """What holds for the whole allocation; shapes are those of the capture.

    rope: as the capture has it.  budget: as the user gave it, of one context.  horizon, window:
    tokens.  utility: name, description and `is_ceiling` of the score; weights_source: where
    `head_weights` come from; rounding_rule: of the quotas.
    """

    model: str
    architecture: str
    model_digest: str
    n_layers: int
    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    rope: Mapping[str, Any]
    page_size: int
    budget: str
    horizon: int
    window: int
    utility: Mapping[str, Any]
    is_calibrated: bool
    drop_coefficient: float
    drop_coefficient_source: str
    weights_source: str
    rounding_rule: str


@dataclass(frozen=True)
class CalibrationArrays:
    """Knots of the monotone tables, natural logarithms.

    starts: (n_layers, n_kv_heads, 3, 2) int64 first and past-the-last knot; third axis key, value,
    drop.  log_scores, log_values: (n_knots).
    """

    starts: npt.NDArray[np.int64]
    log_scores: FloatArray
    log_values: FloatArray


@dataclass(frozen=True)
class PlanInfo:
    """One planned document.

    index: of the document in the capture; the context is its first n_context tokens.
    laid-out bytes by purpose; cost: predicted; policy_cost, policy_bytes: of the frozen quotas.
    """

    index: int
    name: str
    split: Split
    text_sha256: str
    n_tokens: int
    n_context: int
    budget_bytes: int
    codes_bytes: int
    padding_bytes: int
    page_table_bytes: int
    positions_bytes: int
    fixed_table_bytes: int
    cost: float
    dual_bound: float
    multiplier: float
    policy_cost: float
    policy_bytes: int

    @property
    def laid_out_bytes(self) -> int:
        """All of it."""
        return (
            self.codes_bytes
            + self.padding_bytes
            + self.page_table_bytes
            + self.positions_bytes
            + self.fixed_table_bytes
        )


@dataclass(frozen=True)
class StoredPlan:
    """A plan with its arrays: tiers int8 (-1 = dropped), pages int32, `PLAN_AXES`."""

    info: PlanInfo
    tier_of_token: npt.NDArray[np.int8]
    page_of_token: npt.NDArray[np.int32]
    policy_tier_of_token: npt.NDArray[np.int8]


@dataclass(frozen=True)
class AllocationContent:
    """Everything in allocation.h5 but its header.

    tiers: in order of page bytes, without drop.  quotas: (n_layers, n_kv_heads, 1 + n_tiers)
    fractions of pages, drop first.  head_weights: (n_layers, n_q_heads).  tables: rows by name, for
    people and plots, each with its row type.
    """

    info: AllocationInfo
    layers: tuple[LayerInfo, ...]
    frames: FrameSet
    tiers: tuple[TierFormat, ...]
    quotas: FloatArray
    head_weights: FloatArray
    calibration: CalibrationArrays | None
    plans: tuple[StoredPlan, ...]
    tables: Mapping[str, tuple[type[Any], tuple[Any, ...]]]


def save_allocation(
    path: Path,
    content: AllocationContent,
    *,
    capture: ArtifactRef,
    codebooks: ArtifactRef,
    provenance: Mapping[str, Any],
    force: bool = False,
) -> ArtifactRef:
    """Write an allocation; returns how artifacts made from it name it.

    Raises:
        ArtifactError: `path` exists and `force` is false, or it cannot be written.
    """
    inputs = {"capture": capture, "codebooks": codebooks}
    with create_artifact(
        path, "allocation", inputs=inputs, provenance=provenance, force=force
    ) as file:
        _write_content(file, content)
    return artifact_ref(path, read_header(path))


class AllocationReader:
    """Reads an allocation; a context manager, plans when asked for.

    Raises:
        ArtifactError: on entering, when the file is not a whole allocation.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        self._open: h5py.File | None = None

    def __enter__(self) -> Self:
        self._open = self._stack.enter_context(open_artifact(self.path, "allocation"))
        try:
            self._check()
        except (KeyError, ValueError, TypeError, OSError) as error:
            self._stack.close()
            raise self._damaged(error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        self._open = None

    @cached_property
    def header(self) -> Header:
        """Kind, version, digest, inputs, provenance."""
        return read_header(self.path)

    @property
    def digest(self) -> str:
        """The content digest, SHA-256 hex."""
        return self.header.digest

    @property
    def ref(self) -> ArtifactRef:
        """How artifacts made from this allocation name it."""
        return artifact_ref(self.path, self.header)

    def require_capture(self, capture: ArtifactRef) -> None:
        """Refuse any other capture than the one that was allocated; raises ArtifactError."""
        require_input(self.header, "capture", capture, path=str(self.path))

    @cached_property
    def info(self) -> AllocationInfo:
        """Model, budget, score and rules."""
        attrs = self._file.attrs
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(AllocationInfo):
            value = attrs[field.name]
            fields[field.name] = value.item() if isinstance(value, np.generic) else value
        fields["rope"] = json.loads(fields["rope"])
        fields["utility"] = json.loads(fields["utility"])
        return AllocationInfo(**fields)

    @cached_property
    def layers(self) -> tuple[LayerInfo, ...]:
        """Window, softmax scale and soft cap of every layer."""
        return read_rows(self._file, "layers", LayerInfo)

    @cached_property
    def frames(self) -> FrameSet:
        """Centring and rotation, shared by all tiers."""
        return read_frames(self._file, self.info.head_dim)

    @cached_property
    def tiers(self) -> tuple[TierFormat, ...]:
        """The tiers that `tier_of_token` indexes; drop is not among them."""
        described = json.loads(_text(self._file["tiers"][()]))
        return tuple(TierFormat.from_description(tier) for tier in described)

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.info.page_size

    @cached_property
    def documents(self) -> tuple[PlanInfo, ...]:
        """The planned documents, in order."""
        groups = self._file["documents"]
        found = []
        for name in sorted(groups, key=int):
            attrs = groups[name].attrs
            fields = {field.name: attrs[field.name] for field in dataclasses.fields(PlanInfo)}
            plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in fields.items()}
            found.append(PlanInfo(**plain))
        return tuple(found)

    def documents_of(self, split: Split) -> tuple[PlanInfo, ...]:
        """The planned documents of one split."""
        return tuple(document for document in self.documents if document.split == split)

    def tier_of_token(self, document: PlanInfo) -> npt.NDArray[np.int8]:
        """(n_layers, n_kv_heads, n_context) index into `tiers`, -1 = dropped."""
        return self._plan_array(document, "tier_of_token", np.int8)

    def page_of_token(self, document: PlanInfo) -> npt.NDArray[np.int32]:
        """(n_layers, n_kv_heads, n_context) page inside the (layer, KV head), dropped ones too."""
        return self._plan_array(document, "page_of_token", np.int32)

    def policy_tier_of_token(self, document: PlanInfo) -> npt.NDArray[np.int8]:
        """As `tier_of_token`, by the frozen quotas instead of the solved plan; same pages."""
        return self._plan_array(document, "policy_tier_of_token", np.int8)

    @property
    def quotas(self) -> FloatArray:
        """(n_layers, n_kv_heads, 1 + n_tiers) fractions of pages, drop first."""
        return np.asarray(self._file["policy/quotas"][()], dtype=np.float64)

    @property
    def head_weights(self) -> FloatArray:
        """(n_layers, n_q_heads) F of each query head."""
        return np.asarray(self._file["head_weights"][()], dtype=np.float64)

    @property
    def calibration(self) -> CalibrationArrays | None:
        """The tables from score to expected damage, None where scores were believed."""
        if "calibration" not in self._file:
            return None
        group = self._file["calibration"]
        names = (field.name for field in dataclasses.fields(CalibrationArrays))
        return CalibrationArrays(**{name: group[name][()] for name in names})

    def table(self, name: str, row_type: type[Any]) -> tuple[Any, ...]:
        """One of the tables for people; raises KeyError where there is none of that name."""
        return read_rows(self._file["tables"], name, row_type)

    @property
    def _file(self) -> h5py.File:
        if self._open is None:
            raise RuntimeError("AllocationReader is used outside its `with` block")
        return self._open

    def _plan_array(self, document: PlanInfo, name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        index = self.documents.index(document)
        return np.asarray(self._file[f"documents/{index:03d}/{name}"][()], dtype=dtype)

    def _check(self) -> None:
        info = self.info
        if len(self.layers) != info.n_layers:
            raise ValueError(f"{len(self.layers)} layers in its table, n_layers {info.n_layers}")
        heads = (info.n_layers, info.n_kv_heads)
        if self._file["policy/quotas"].shape != (*heads, 1 + len(self.tiers)):
            raise ValueError(f"quotas have shape {self._file['policy/quotas'].shape}")
        _ = self.frames
        for index, document in enumerate(self.documents):
            for name in ("tier_of_token", "page_of_token", "policy_tier_of_token"):
                shape = self._file[f"documents/{index:03d}/{name}"].shape
                if shape != (*heads, document.n_context):
                    raise ValueError(f"documents/{index:03d}/{name} has shape {shape}")

    def _damaged(self, error: Exception) -> ArtifactError:
        why = str(error).strip("'\"")
        return ArtifactError(f"{self.path} is damaged ({why})", "make it again: `sphkv allocate`")


def _write_content(file: h5py.File, content: AllocationContent) -> None:
    for field in dataclasses.fields(AllocationInfo):
        value = getattr(content.info, field.name)
        is_mapping = isinstance(value, Mapping)
        file.attrs[field.name] = json.dumps(dict(value), sort_keys=True) if is_mapping else value
    write_rows(file, "layers", content.layers, LayerInfo)
    write_frames(file, content.frames)
    described = json.dumps([tier.describe() for tier in content.tiers], sort_keys=True)
    _create(file, "tiers", np.array(described.encode()), "")
    _create(file, "policy/quotas", content.quotas, "n_layers, n_kv_heads, n_options")
    _create(file, "head_weights", content.head_weights, "n_layers, n_q_heads")
    if content.calibration is not None:
        arrays = content.calibration
        axes = "n_layers, n_kv_heads, n_quantities, n_ends"
        _create(file, "calibration/starts", arrays.starts, axes)
        _create(file, "calibration/log_scores", arrays.log_scores, "n_knots")
        _create(file, "calibration/log_values", arrays.log_values, "n_knots")
    documents = file.create_group("documents")
    for index, plan in enumerate(content.plans):
        group = documents.create_group(f"{index:03d}")
        for field in dataclasses.fields(PlanInfo):
            group.attrs[field.name] = getattr(plan.info, field.name)
        for name in ("tier_of_token", "page_of_token", "policy_tier_of_token"):
            _create(group, name, getattr(plan, name), PLAN_AXES)
    tables = file.create_group("tables")
    for name, (row_type, rows) in content.tables.items():
        write_rows(tables, name, rows, row_type)


def _create(group: h5py.Group, name: str, values: npt.NDArray[Any], axes: str) -> None:
    group.create_dataset(name, data=values).attrs["axes"] = axes


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
