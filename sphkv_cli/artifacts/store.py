"""Writing and opening artifacts: one temporary file and one rename, and a digest of the content.

The content digest is SHA-256 over the sorted tree: for each dataset its name, dtype, shape and
bytes in C order, and every attribute, except the header's own (`digest`, `provenance`) and the
file names inside `inputs`. So it is the same for the same content, whatever the file is called,
whenever and wherever it was written, and however HDF5 laid it out.
"""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sphkv_cli.artifacts.damage import damaged, reading
from sphkv_cli.artifacts.header import (
    FORMAT_NAME,
    MADE_BY,
    VERSIONS,
    ArtifactRef,
    Header,
    decode_inputs,
    encode_inputs,
)
from sphkv_cli.errors import ArtifactError, UsageError

_HASH_CHUNK_BYTES = 1 << 24
_UNDIGESTED = frozenset({"digest", "provenance", "inputs"})


@contextlib.contextmanager
def create_artifact(
    path: Path,
    kind: str,
    *,
    inputs: Mapping[str, ArtifactRef],
    provenance: Mapping[str, Any],
    force: bool = False,
) -> Iterator[h5py.File]:
    """Yield an HDF5 file that becomes `path` when the block ends without an exception.

    Args:
        path: the artifact; its folder must exist.
        kind: one of the keys of `VERSIONS`.
        inputs: the artifacts it is made from, by role.
        provenance: JSON-able facts about this run; not part of the digest.
        force: overwrite an existing file.

    Raises:
        ArtifactError: the file exists and `force` is false, or the folder cannot be written.
    """
    check_output(path, force=force)
    with replaced_when_whole(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["format"] = FORMAT_NAME
        file.attrs["kind"] = kind
        file.attrs["version"] = VERSIONS[kind]
        file.attrs["inputs"] = encode_inputs(inputs)
        file.attrs["provenance"] = json.dumps(dict(provenance), sort_keys=True)
        yield file
        file.attrs["digest"] = content_digest(file)


@contextlib.contextmanager
def replaced_when_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` that takes its place when the block ends well.

    Raises:
        ArtifactError: it cannot be written; `path` is as it was and nothing else is left.
    """
    with os_errors_name(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            # mkstemp makes private files; an artifact gets the permissions of any new file.
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def open_artifact(path: Path, kind: str) -> Iterator[h5py.File]:
    """Yield the HDF5 file at `path`, open for reading, after checking that it is a `kind`.

    Raises:
        ArtifactError: missing, truncated, foreign, of another kind or of a newer version; the
            message says how to make it.
    """
    with _opened(path, kind) as file:
        header = _read_header(file, path, kind)
        if header.kind != kind:
            raise ArtifactError(
                f"{path} holds {header.kind}, not {kind}", f"make it with `{MADE_BY[kind]}`"
            )
        yield file


def read_header(path: Path) -> Header:
    """Read the header of any HDF5 artifact; raises ArtifactError as `open_artifact` does."""
    with _opened(path) as file:
        return _read_header(file, path)


def artifact_ref(path: Path, header: Header) -> ArtifactRef:
    """The reference under which artifacts made from this one record it."""
    return ArtifactRef(header.kind, header.digest, path.name)


def require_unchanged(path: Path) -> None:
    """Refuse an artifact whose content no longer has the digest that it was written with.

    The stages do so for codebooks and allocations, which are small. A capture can be as large as
    the disk and is left to `sphkv inspect --verify`.

    Raises:
        ArtifactError: the content was changed, or the file cannot be read.
    """
    if not verify_digest(path):
        kind = read_header(path).kind
        raise ArtifactError(
            f"{path} was changed after it was written: its content does not have its digest",
            f"make it again with `{MADE_BY[kind]}`",
        )


def verify_digest(path: Path) -> bool:
    """Recompute the content digest of an artifact and compare it with the recorded one.

    Raises:
        ArtifactError: the content cannot be read.
    """
    with _opened(path) as file:
        header = _read_header(file, path)
        with reading(path, header.kind):
            return content_digest(file) == header.digest


def check_outputs(
    outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None], *, force: bool
) -> None:
    """`check_output` of each output of a command, none of which may be another or an input.

    Args:
        outputs, inputs: every file of the command by option or argument, as typed; None where it
            was left out.

    Raises:
        UsageError: an output names the same file as an input or as another output.
        ArtifactError: as `check_output`.
    """
    given = {option: path for option, path in outputs.items() if path is not None}
    name_of = {os.path.realpath(path): name for name, path in inputs.items() if path is not None}
    for option, path in given.items():
        other = name_of.setdefault(os.path.realpath(path), option)
        if other != option:
            raise UsageError(f"{other} and {option} name the same file, {path}", "give two names")
    for option, path in given.items():
        check_output(path, force=force, option=option)


def check_output(path: Path, *, force: bool, option: str = "--output") -> None:
    """Refuse early what `create_artifact` would refuse late; option: what named the path.

    Raises:
        ArtifactError: `path` exists and `force` is false, is a folder, a device or a pipe, or its
            folder is missing or read-only.
    """
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder", f"name a file with {option}")
    if path.exists() and not path.is_file():
        # The rename would put a file in the place of a device, a pipe or a socket.
        raise ArtifactError(f"{path} is not a regular file", f"name another {option}")
    if path.exists() and not force:
        raise ArtifactError(f"{path} exists", f"pass --force to overwrite it, or another {option}")
    if not path.parent.is_dir():
        raise ArtifactError(
            f"the folder {path.parent} does not exist", f"make it first, or choose another {option}"
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ArtifactError(
            f"the folder {path.parent} cannot be written", f"choose another {option}"
        )


def content_digest(file: h5py.File) -> str:
    """SHA-256 of the content, as the module says; lowercase hex."""
    digest = hashlib.sha256()

    def attributes(item: h5py.Group | h5py.Dataset, name: str) -> None:
        for key in sorted(item.attrs):
            if name == "" and key in _UNDIGESTED:
                continue
            value = np.asarray(item.attrs[key])
            text = value.tolist()
            digest.update(
                f"@{name}/{key}={json.dumps(text, sort_keys=True, default=str)}\n".encode()
            )

    def visit(group: h5py.Group, prefix: str) -> None:
        for key in sorted(group):
            item, name = group[key], f"{prefix}/{key}"
            attributes(item, name)
            if isinstance(item, h5py.Group):
                digest.update(f"group {name}\n".encode())
                visit(item, name)
            else:
                digest.update(f"dataset {name} {item.dtype.str} {item.shape}\n".encode())
                for block in _blocks(item):
                    digest.update(block)

    attributes(file, "")
    inputs = decode_inputs(file.attrs["inputs"])
    digest.update(json.dumps({role: ref.digest for role, ref in sorted(inputs.items())}).encode())
    visit(file, "")
    return digest.hexdigest()


def _blocks(dataset: h5py.Dataset) -> Iterator[bytes | memoryview]:
    """The bytes of a dataset in C order, in blocks along its first axis."""
    if dataset.dtype.kind == "O":  # variable-length strings have no fixed bytes
        yield json.dumps([_as_text(v) for v in np.ravel(dataset[()])]).encode()
    elif dataset.shape == () or 0 in dataset.shape:
        yield np.asarray(dataset[()]).tobytes()
    else:
        row_bytes = max(1, dataset.nbytes // dataset.shape[0])
        step = max(1, _HASH_CHUNK_BYTES // row_bytes)
        for start in range(0, dataset.shape[0], step):
            yield np.ascontiguousarray(dataset[start : start + step]).tobytes()


def _as_text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _read_header(file: h5py.File, path: Path, wanted: str | None = None) -> Header:
    with reading(path, wanted):
        attrs = file.attrs
        name, kind = attrs.get("format"), str(attrs.get("kind"))
    if name != FORMAT_NAME:
        raise ArtifactError(f"{path} was not written by sphkv", "check the path")
    if kind not in VERSIONS:
        raise ArtifactError(
            f"{path} is a {kind!r}, which this sphkv does not know", "upgrade sphkv"
        )
    try:
        version = int(attrs["version"])
        if version < 1:
            raise ValueError(f"version {version}")
        if version > VERSIONS[kind]:
            raise ArtifactError(
                f"{path} has {kind} format version {version}, this sphkv reads up to "
                f"{VERSIONS[kind]}",
                "upgrade sphkv",
            )
        return Header(
            kind=kind,
            version=version,
            digest=str(attrs["digest"]),
            inputs=decode_inputs(attrs["inputs"]),
            provenance=json.loads(attrs["provenance"]),
        )
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{path} has a damaged header ({error})", f"remake it with `{MADE_BY[kind]}`"
        ) from error


@contextlib.contextmanager
def _opened(path: Path, kind: str | None = None) -> Iterator[h5py.File]:
    if not path.exists():
        hint = f"make it with `{MADE_BY[kind]}`" if kind else "check the path"
        raise ArtifactError(f"{path} does not exist", hint)
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder", "name the file in it")
    try:
        file = h5py.File(path, "r")
    except PermissionError as error:
        raise ArtifactError(
            f"{path} cannot be read ({error.strerror})", "mend its rights"
        ) from error
    except OSError as error:
        if _is_hdf5(path):
            raise damaged(path, kind) from error
        hint = f"make it again with `{MADE_BY[kind]}`" if kind else "check the path"
        raise ArtifactError(f"{path} is not an HDF5 file", hint) from error
    with file:
        yield file


def _is_hdf5(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(8) == b"\x89HDF\r\n\x1a\n"
    except OSError:
        return False


@contextlib.contextmanager
def os_errors_name(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _write_error(path, error) from error
    except RuntimeError as error:
        # Closing or flushing an HDF5 file on a full disk raises this instead of OSError.
        if "unable to" not in str(error).lower() and "can't" not in str(error).lower():
            raise
        raise _write_error(path, OSError(str(error))) from error


def _write_error(path: Path, error: OSError) -> ArtifactError:
    # HDF5 reports a full disk in the text of an error without errno.
    text = str(error)
    if error.errno == errno.ENOSPC or "No space left" in text or "errno = 28" in text:
        return ArtifactError(
            f"the disk of {path.parent} is full, {path.name} was not written", "free some space"
        )
    if error.errno == errno.EFBIG or "File too large" in text or "errno = 27" in text:
        return ArtifactError(
            f"{path.name} outgrew the file size limit of this shell or disk, it was not written",
            "raise the limit (ulimit -f) or choose another disk",
        )
    why = error.strerror or text
    return ArtifactError(f"{path} could not be written ({why})", "check the disk and the folder")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
