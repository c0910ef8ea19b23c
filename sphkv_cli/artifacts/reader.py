"""What lazy readers of HDF5 artifacts share: open, check, header, digest, one way to fail."""

from abc import ABC, abstractmethod
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy.typing as npt

from sphkv_cli.artifacts.header import ArtifactRef, Header
from sphkv_cli.artifacts.store import artifact_ref, open_artifact, read_header
from sphkv_cli.errors import ArtifactError


class ArtifactReader(ABC):
    """A context manager around one file; datasets are read when they are asked for.

    Raises:
        ArtifactError: on entering, when the file is not a whole artifact of its kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        self._open: h5py.File | None = None

    @property
    @abstractmethod
    def kind(self) -> str:
        """Kind of artifact, as its header has it."""

    @property
    @abstractmethod
    def command(self) -> str:
        """The command that makes it."""

    @abstractmethod
    def _check(self) -> None:
        """Read what must be there; KeyError, ValueError, TypeError or OSError where it is not."""

    def __enter__(self) -> Self:
        self._open = self._stack.enter_context(open_artifact(self.path, self.kind))
        try:
            self._check()
        except (KeyError, ValueError, TypeError, OSError) as error:
            self._stack.close()
            raise self._damaged(str(error).strip("'\"")) from error
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
        """How artifacts made from this one name it."""
        return artifact_ref(self.path, self.header)

    @property
    def _file(self) -> h5py.File:
        if self._open is None:
            raise RuntimeError(f"{type(self).__name__} is used outside its `with` block")
        return self._open

    def _damaged(self, why: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path} is a damaged {self.kind} ({why})", f"make it again with `{self.command}`"
        )


def write_array(group: h5py.Group, name: str, values: npt.NDArray[Any], axes: str) -> None:
    """A dataset with its axes named, as FORMAT.md asks for."""
    group.create_dataset(name, data=values).attrs["axes"] = axes
