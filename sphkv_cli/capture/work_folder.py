"""The folder beside the output in which a capture grows, one shard per document.

An HDF5 file whose writer is killed can be unreadable, so the artifact is not written until every
document is there. A shard is written under a temporary name, synced and renamed: a shard that has
its name is whole. `plan.json` holds the parameters, and a run that resumes must have the same.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import h5py

from sphkv_cli.errors import ArtifactError, SphkvError

DOCUMENT = "document"


class WorkFolder:
    """The shards of one unfinished capture; held by one process at a time.

    Args:
        output: the artifact that will be made.
        parameters: JSON-able; everything that decides what the shards hold.
        resume: go on with what is there; otherwise an unfinished capture is refused.
        force: throw an unfinished capture away.

    Raises:
        ArtifactError: an unfinished capture of other parameters, or of any without resume/force;
            or the folder cannot be made.
    """

    def __init__(
        self, output: Path, parameters: Mapping[str, Any], *, resume: bool, force: bool
    ) -> None:
        self.path = work_path(output)
        self._output = output
        text = json.dumps(dict(parameters), sort_keys=True, indent=1)
        with disk_errors_name(self.path):
            self.path.mkdir(exist_ok=True)
            self._lock = self._take_lock()
            try:
                self._check(json.loads(text), resume=resume, force=force)
                (self.path / "plan.json").write_text(text)
            except BaseException:
                self._lock.close()
                raise

    def shard_path(self, index: int) -> Path:
        """Where the shard of document `index` stands once it is whole."""
        return self.path / f"{index:03d}.h5"

    @property
    def n_documents(self) -> int:
        """How many documents are kept."""
        return sum(1 for _ in self.path.glob("[0-9]*.h5"))

    def has(self, index: int) -> bool:
        """Whether document `index` is captured."""
        return self.shard_path(index).is_file()

    @contextlib.contextmanager
    def new_shard(self, index: int) -> Iterator[h5py.File]:
        """Yield the file of document `index`; it gets its name when the block ends well."""
        temporary = self.path / f".{index:03d}.partial"
        with disk_errors_name(self.path):
            try:
                with h5py.File(temporary, "w") as file:
                    yield file
                with temporary.open("rb") as written:
                    os.fsync(written.fileno())
                temporary.replace(self.shard_path(index))
            finally:
                temporary.unlink(missing_ok=True)

    def close(self) -> None:
        """Let the folder go; a folder without a single shard is removed."""
        if self.path.exists() and not any(self.path.glob("[0-9]*.h5")):
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def remove(self) -> None:
        """Remove the folder with everything in it, the capture being made."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def _take_lock(self) -> IO[str]:
        lock = (self.path / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise ArtifactError(
                f"another sphkv is writing {self._output}", "wait for it, or name another --output"
            ) from error
        return lock

    def _check(self, parameters: Mapping[str, Any], *, resume: bool, force: bool) -> None:
        shards = sorted(self.path.glob("[0-9]*.h5"))
        if not shards:
            return
        if not resume:
            if not force:
                raise ArtifactError(
                    f"{self.path} holds an unfinished capture ({len(shards)} documents)",
                    "pass --resume to go on with it, or --force to throw it away",
                )
            for shard in shards:
                shard.unlink()
            return
        try:
            there = json.loads((self.path / "plan.json").read_text())
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{self.path} does not say what it was made with", "pass --force without --resume"
            ) from error
        # Other options mean other documents as well; the option is what the user can act on.
        for name in sorted({*there, *parameters}, key=lambda n: (n == "documents", n)):
            if there.get(name) != parameters.get(name):
                raise ArtifactError(
                    f"{self.path} was made with another {name}: {_short(there.get(name))}, "
                    f"now {_short(parameters.get(name))}",
                    "repeat the options of the unfinished run, or pass --force without --resume",
                )


def work_path(output: Path) -> Path:
    """The work folder of `output`."""
    return output.with_name(f"{output.name}.work")


def shard_bytes(output: Path) -> int:
    """Bytes of the whole shards that an unfinished capture left."""
    return sum(shard.stat().st_size for shard in work_path(output).glob("[0-9]*.h5"))


@contextlib.contextmanager
def disk_errors_name(path: Path) -> Iterator[None]:
    """Turn the disk's errors inside the block into one line that names the folder."""
    try:
        yield
    except SphkvError:
        raise
    except (OSError, RuntimeError) as error:
        # HDF5 tells of a full disk in the text of an error alone; on closing, as a RuntimeError.
        if isinstance(error, RuntimeError):
            if "No space left" not in str(error) and "errno = 28" not in str(error):
                raise
            error = OSError(errno.ENOSPC, "No space left on device")
        if error.errno == errno.ENOSPC or "No space left" in str(error):
            raise ArtifactError(
                f"the disk of {path.parent} is full",
                "free some space and go on with --resume",
            ) from error
        why = error.strerror or str(error).splitlines()[0]
        raise ArtifactError(f"{path} cannot be written ({why})", "check the folder") from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
