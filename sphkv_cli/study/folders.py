"""Folders that are written whole or not at all: one per study, so that none harms another's."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from sphkv_cli.artifacts.store import os_errors_name
from sphkv_cli.errors import ArtifactError, UsageError


def check_folder(path: Path, inputs: Mapping[str, Path | None], *, force: bool) -> None:
    """Refuse early what `folder_when_whole` would refuse late.

    Args:
        inputs: every file or folder that is read, by option; None where it was left out.

    Raises:
        UsageError: an input lies in `path`, which is replaced as a whole.
        ArtifactError: `path` exists and `force` is false, or is a file.
    """
    replaced = os.path.realpath(path)
    for option, source in inputs.items():
        if source is not None and Path(os.path.realpath(source)).is_relative_to(replaced):
            raise UsageError(
                f"{option} {source} lies in {path}, which is replaced", "name another --output"
            )
    if path.exists() and not path.is_dir():
        raise ArtifactError(f"{path} is a file", "name another --output")
    if path.exists() and not force:
        raise ArtifactError(f"{path} exists", "pass --force to overwrite it, or another --output")


@contextlib.contextmanager
def folder_when_whole(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` that takes its place when the block ends well.

    Raises:
        ArtifactError: it cannot be written; `path` is as it was and nothing else is left.
    """
    with os_errors_name(path):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            with _moved_away(path):
                temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _moved_away(path: Path) -> Iterator[None]:
    """`path` out of the way while the block runs; put back if it fails, removed if it ends well."""
    if not path.exists():
        yield
        return
    # Renaming onto a folder that is not empty is an error, so the old one steps aside first.
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        path.replace(aside)
        try:
            yield
        except BaseException:
            aside.replace(path)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
