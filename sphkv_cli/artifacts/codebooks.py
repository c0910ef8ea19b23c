"""codebooks.h5: the frames of one model and its ordered candidate codes, with what they cost.

FORMAT.md specifies the file; `codebooks_content.py` holds what is in it. The file is small and is
read at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sphkv_cli.artifacts.codebooks_content import (
    MEASURES,
    CodebooksContent,
    ModelShape,
    read_content,
    write_content,
)
from sphkv_cli.artifacts.damage import reading
from sphkv_cli.artifacts.empirical_books import EmpiricalBooks
from sphkv_cli.artifacts.fit_tables import FitTables
from sphkv_cli.artifacts.header import ArtifactRef, Header, require_input
from sphkv_cli.artifacts.store import artifact_ref, create_artifact, open_artifact, read_header
from sphkv_cli.errors import ArtifactError
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.sink_rule import SinkRule
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.tier import TierFormat

__all__ = [
    "MEASURES",
    "Capture",
    "CodebooksContent",
    "CodebooksReader",
    "ModelShape",
    "save_codebooks",
]

FloatArray = npt.NDArray[np.float64]


class Capture(Protocol):
    """What of a capture the codebooks must fit."""

    @property
    def path(self) -> Path:
        """Its file."""

    @property
    def model(self) -> str:
        """Name of the model."""

    @property
    def model_digest(self) -> str:
        """Tells models apart."""

    @property
    def ref(self) -> ArtifactRef:
        """How artifacts made from it name it."""


@dataclass(frozen=True)
class CodebooksReader:
    """An opened codebooks.h5; everything is in memory, the file is closed."""

    path: Path
    header: Header
    content: CodebooksContent

    @classmethod
    def open(cls, path: Path) -> "CodebooksReader":
        """Read and check codebooks.

        Raises:
            ArtifactError: missing, truncated, foreign or newer file; damaged shapes; a rotation
                whose matrix has another digest than recorded.
        """
        with open_artifact(path, "codebooks") as file, reading(path, "codebooks"):
            content = read_content(file)
        return cls(path, read_header(path), content)

    @property
    def digest(self) -> str:
        """The content digest, SHA-256 hex."""
        return self.header.digest

    @property
    def ref(self) -> ArtifactRef:
        """How artifacts made from these codebooks name them."""
        return artifact_ref(self.path, self.header)

    @property
    def shape(self) -> ModelShape:
        """The model."""
        return self.content.shape

    @property
    def frames(self) -> FrameSet:
        """Centring and rotation, shared by all tiers."""
        return self.content.frames

    @property
    def sinks(self) -> SinkRule | None:
        """Which keys are worth keeping dense; None in files of version 1."""
        return self.content.sinks

    @property
    def codes(self) -> tuple[SphericalCode, ...]:
        """The candidates in order."""
        return self.content.codes

    @property
    def tiers(self) -> tuple[TierFormat, ...]:
        """Pairs (key code, value code) in order; int8, dense and drop are not among them."""
        return self.content.tiers

    @property
    def tables(self) -> FitTables:
        """What the fit measured."""
        return self.content.tables

    @property
    def measured(self) -> Mapping[str, FloatArray]:
        """Per layer and KV head: the arrays of `MEASURES`."""
        return self.content.measured

    @property
    def empirical(self) -> EmpiricalBooks | None:
        """Books per layer and head, where the fit made them."""
        return self.content.empirical

    def code(self, name: str) -> SphericalCode:
        """The candidate called `name`.

        Raises:
            ArtifactError: there is none; lists those there are.
        """
        for code in self.codes:
            if code.name == name:
                return code
        raise ArtifactError(
            f"{self.path} has no code {name!r}",
            f"choose one of {', '.join(code.name for code in self.codes)}",
        )

    def require_model(self, capture: Capture) -> None:
        """Refuse a capture of another model.

        Raises:
            ArtifactError: names both models.
        """
        if capture.model_digest != self.shape.model_digest:
            raise ArtifactError(
                f"{self.path} was fitted on the model {self.shape.model} (digest "
                f"{self.shape.model_digest[:12]}), {capture.path} captures {capture.model} "
                f"(digest {capture.model_digest[:12]})",
                "fit codebooks on this capture with `sphkv fit-codebooks`",
            )

    def require_capture(self, capture: Capture) -> None:
        """Refuse any other capture than the one the codebooks were fitted on.

        Raises:
            ArtifactError: another model, or another capture of it.
        """
        self.require_model(capture)
        require_input(self.header, "capture", capture.ref, path=str(self.path))


def save_codebooks(
    path: Path,
    content: CodebooksContent,
    *,
    capture: ArtifactRef,
    provenance: Mapping[str, Any],
    force: bool = False,
) -> ArtifactRef:
    """Write codebooks made from `capture`; returns how artifacts made from them name them.

    Raises:
        ArtifactError: `path` exists and `force` is false, or it cannot be written.
    """
    with create_artifact(
        path, "codebooks", inputs={"capture": capture}, provenance=provenance, force=force
    ) as file:
        write_content(file, content)
    return artifact_ref(path, read_header(path))
