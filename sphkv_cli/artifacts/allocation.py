"""allocation.h5: what to keep of every context and how precisely, and the policy behind it.

FORMAT.md specifies the file.  It is self-contained: frames, codes, tiers, quotas, the score's
definition and calibration lie in it, so that pages can be rebuilt from it and a capture alone.
The reader is lazy for the plans of documents.
"""

import dataclasses
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sphkv_cli.artifacts.allocation_content import (
    AllocationContent,
    AllocationInfo,
    CalibrationArrays,
    PlanInfo,
    QuotaFitArrays,
    write_content,
)
from sphkv_cli.artifacts.capture_info import LayerInfo, Split
from sphkv_cli.artifacts.frames import read_frames
from sphkv_cli.artifacts.header import ArtifactRef, require_input
from sphkv_cli.artifacts.reader import ArtifactReader, reads
from sphkv_cli.artifacts.row_tables import read_rows
from sphkv_cli.artifacts.store import artifact_ref, create_artifact, read_header
from sphkv_codebooks.frame import FrameSet
from sphkv_kernels.tier import TierFormat

FloatArray = npt.NDArray[np.float64]

__all__ = [
    "AllocationContent",
    "AllocationInfo",
    "AllocationReader",
    "CalibrationArrays",
    "PlanInfo",
    "QuotaFitArrays",
    "save_allocation",
]


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
        write_content(file, content)
    return artifact_ref(path, read_header(path))


class AllocationReader(ArtifactReader):
    """Reads an allocation; a context manager, plans when asked for.

    Raises:
        ArtifactError: on entering, when the file is not a whole allocation.
    """

    @property
    def kind(self) -> str:
        return "allocation"

    def require_capture(self, capture: ArtifactRef) -> None:
        """Refuse any other capture than the one that was allocated; raises ArtifactError."""
        require_input(self.header, "capture", capture, path=str(self.path))

    def is_of(self, capture: ArtifactRef) -> bool:
        """Whether this very capture was allocated."""
        return self.header.inputs["capture"].digest == capture.digest

    @cached_property
    def info(self) -> AllocationInfo:
        """Model, budget, score and rules."""
        attrs = self._file.attrs
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(AllocationInfo):
            if field.name not in attrs and field.default is not dataclasses.MISSING:
                continue
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
        return self._plan_tiers(document, "tier_of_token")

    def page_of_token(self, document: PlanInfo) -> npt.NDArray[np.int32]:
        """(n_layers, n_kv_heads, n_context) page inside the (layer, KV head), dropped ones too."""
        return self._plan_array(document, "page_of_token", np.int32)

    def policy_tier_of_token(self, document: PlanInfo) -> npt.NDArray[np.int8]:
        """As `tier_of_token`, by the frozen quotas instead of the solved plan; same pages."""
        return self._plan_tiers(document, "policy_tier_of_token")

    @property
    @reads
    def quotas(self) -> FloatArray:
        """(n_layers, n_kv_heads, 1 + n_tiers) fractions of pages, drop first."""
        return np.asarray(self._file["policy/quotas"][()], dtype=np.float64)

    @cached_property
    @reads
    def quota_fit(self) -> QuotaFitArrays | None:
        """What quotas are fitted from, for other budgets and lengths; None in files without it."""
        group = self._file["policy"]
        if "fit" not in group:
            return None
        pages = tuple(
            np.asarray(group["fit"][name][()], dtype=np.float32)
            for name in sorted(group["fit"], key=int)
        )
        return QuotaFitArrays(
            pages,
            *(
                np.asarray(group[name][()], dtype=np.float64)
                for name in ("price_rates", "price_of_drop", "price_of_code")
            ),
        )

    @property
    @reads
    def head_weights(self) -> FloatArray:
        """(n_layers, n_q_heads) F of each query head."""
        return np.asarray(self._file["head_weights"][()], dtype=np.float64)

    @property
    @reads
    def drop_coefficients(self) -> FloatArray:
        """(n_layers, n_kv_heads) c_drop; one number for all in files of version 1."""
        if "drop_coefficients" not in self._file:
            shape = (self.info.n_layers, self.info.n_kv_heads)
            return np.full(shape, self.info.drop_coefficient)
        return np.asarray(self._file["drop_coefficients"][()], dtype=np.float64)

    @property
    @reads
    def code_coefficients(self) -> FloatArray:
        """(n_layers, n_kv_heads) c_code; 1 in files that lack it."""
        if "code_coefficients" not in self._file:
            return np.ones((self.info.n_layers, self.info.n_kv_heads))
        return np.asarray(self._file["code_coefficients"][()], dtype=np.float64)

    @property
    @reads
    def score_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What the score needs beside its name, as FORMAT.md says; empty where that says all."""
        if "score" not in self._file:
            return {}
        return {name: np.asarray(dataset[()]) for name, dataset in self._file["score"].items()}

    @property
    @reads
    def calibration(self) -> CalibrationArrays | None:
        """The tables from score to expected damage, None where scores were believed."""
        if "calibration" not in self._file:
            return None
        group = self._file["calibration"]
        names = (field.name for field in dataclasses.fields(CalibrationArrays))
        return CalibrationArrays(**{name: group[name][()] for name in names})

    @reads
    def table(self, name: str, row_type: type[Any]) -> tuple[Any, ...]:
        """One of the tables for people."""
        return read_rows(self._file["tables"], name, row_type)

    @reads
    def _plan_tiers(self, document: PlanInfo, name: str) -> npt.NDArray[np.int8]:
        tiers = self._plan_array(document, name, np.int8)
        if tiers.size and not -1 <= tiers.min() <= tiers.max() < len(self.tiers):
            raise ValueError(f"{name} has tiers from {tiers.min()} to {tiers.max()}")
        return tiers

    @reads
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
        if "fit" in self._file["policy"]:
            for name, pages in self._file["policy/fit"].items():
                if (*pages.shape[:2], pages.shape[3]) != (*heads, 1 + len(self.tiers)):
                    raise ValueError(f"policy/fit/{name} has shape {pages.shape}")
            n_rates = self._file["policy/price_rates"].size
            for kind in ("drop", "code"):
                shape = self._file[f"policy/price_of_{kind}"].shape
                if shape != (n_rates, *heads):
                    raise ValueError(f"policy/price_of_{kind} has shape {shape}")
        _ = self.frames
        for index, document in enumerate(self.documents):
            for name in ("tier_of_token", "page_of_token", "policy_tier_of_token"):
                shape = self._file[f"documents/{index:03d}/{name}"].shape
                if shape != (*heads, document.n_context):
                    raise ValueError(f"documents/{index:03d}/{name} has shape {shape}")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
