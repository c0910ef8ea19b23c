"""What lazy readers of HDF5 artifacts share: open, check, header, digest, one way to fail."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import h5py
import numpy.typing as npt

from sphkv_cli.artifacts.damage import damaged, reading
from sphkv_cli.artifacts.header import ArtifactRef, Header
from sphkv_cli.artifacts.store import artifact_ref, open_artifact, read_header
from sphkv_cli.errors import ArtifactError

R = TypeVar("R", bound="ArtifactReader")
P = ParamSpec("P")
T = TypeVar("T")


class ArtifactReader(ABC):
    """A context manager around one file; datasets are read when they are asked for.

    A public method of a subclass that reads one is marked with `reads`.

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

    @abstractmethod
    def _check(self) -> None:
        """Read what must be there; KeyError, ValueError, TypeError or OSError where it is not."""

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            self._open = opened.enter_context(open_artifact(self.path, self.kind))
            with reading(self.path, self.kind):
                self._check()
            self._stack = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        self._open = None

    @functools.cached_property
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
        return damaged(self.path, self.kind, why)


def reads(method: Callable[Concatenate[R, P], T]) -> Callable[Concatenate[R, P], T]:
    """Of a reader's method that reads after `_check`: what it meets on damage names the file."""

    @functools.wraps(method)
    def named(self: R, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with reading(self.path, self.kind):
            return method(self, *args, **kwargs)

    return named


def write_array(group: h5py.Group, name: str, values: npt.NDArray[Any], axes: str) -> None:
    """A dataset with its axes named, as FORMAT.md asks for."""
    group.create_dataset(name, data=values).attrs["axes"] = axes
