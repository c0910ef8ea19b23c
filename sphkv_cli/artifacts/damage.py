"""A damaged HDF5 file as one sentence: which file, what is wrong, how to make it again.

h5py has no error of its own for damage. By the layer that meets it, it raises OSError,
RuntimeError, KeyError, ValueError or TypeError, and checks of what was read raise the last three.
"""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from sphkv_cli.artifacts.header import MADE_BY
from sphkv_cli.errors import ArtifactError


@contextlib.contextmanager
def reading(path: Path, kind: str | None = None) -> Iterator[None]:
    """Around reads and checks of what was read, never around work with it: that can fail otherwise.

    Args:
        kind: of the artifact, where it is known.

    Raises:
        ArtifactError: the file is damaged. A RuntimeError that is not h5py's passes as it is.
    """
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, RuntimeError) and not _is_of_h5py(error):
            raise
        why = " ".join(str(error).split()).strip("'\"")
        raise damaged(path, kind, why) from error


def damaged(path: Path, kind: str | None, why: str = "") -> ArtifactError:
    """The error to raise; why: what is wrong, in a few words."""
    return ArtifactError(
        f"{path} is truncated or damaged" + (f" ({why})" if why else ""),
        f"make it again with `{MADE_BY[kind]}`" if kind else "make it again, or check the path",
    )


def _is_of_h5py(error: BaseException) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("h5py.")
