"""CUDA source -> cubin: NVRTC through cuda-core, on a machine with or without a GPU.

    key = SHA-256(source, architecture, standard, NVRTC version)

A build depends on nothing else but patch releases, so its cubin is kept on disk under the key.
Cubin and never PTX: a driver older than NVRTC cannot load its PTX. The sources include no header,
so that nothing but the wheels of the `cuda` extra is needed. Source: ours; the cache after
DeepGEMM's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import warnings
from pathlib import Path

STANDARD = "c++17"


class KernelBuildError(RuntimeError):
    """NVRTC is missing or refused the source; the message holds its own text."""


def cache_folder() -> Path:
    """Where cubins are kept: $XDG_CACHE_HOME/sphkv (default ~/.cache/sphkv)."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "sphkv" / "cubin"


def compile_cubin(
    source: str, capability: int, *, folder: Path | None = None, use_cache: bool = True
) -> bytes:
    """The cubin of `source` for a compute capability (90 = sm_90).

    folder: of the cache, `cache_folder()` by default; where it cannot be written a warning says so.
    Raises KernelBuildError with the compiler's text, or with what to install.
    """
    folder = cache_folder() if folder is None else folder
    path = folder / f"{build_key(source, capability)}.cubin"
    if use_cache:
        with contextlib.suppress(OSError):  # not there, or not to be read
            return path.read_bytes()
    cubin = _compile(source, capability)
    if use_cache:
        try:
            _write_atomically(path, cubin)
        except OSError as error:
            warnings.warn(
                f"a kernel could not be kept in {folder} ({error}) and will be compiled again; set "
                "XDG_CACHE_HOME to a folder that can be written",
                stacklevel=2,
            )
    return cubin


def build_key(source: str, capability: int) -> str:
    """Hex digest of everything a build depends on."""
    parts = (source, f"sm_{capability}", STANDARD, nvrtc_version())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def nvrtc_version() -> str:
    """For example "13.0"."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise KernelBuildError(_missing(error)) from error
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:
        raise KernelBuildError(_missing(error)) from error
    if int(status) != 0:
        raise KernelBuildError(f"nvrtcVersion failed with status {int(status)}")
    return f"{major}.{minor}"


def _compile(source: str, capability: int) -> bytes:
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise KernelBuildError(_missing(error)) from error
    options = ProgramOptions(arch=f"sm_{capability}", std=STANDARD)
    try:
        code = Program(source, "c++", options).compile("cubin").code
    except Exception as error:  # cuda-core raises its own types; its text is NVRTC's log
        raise KernelBuildError(f"NVRTC could not compile for sm_{capability}:\n{error}") from error
    if not isinstance(code, bytes):
        raise KernelBuildError(f"cuda-core returned {type(code).__name__} instead of a cubin")
    return code


def _missing(error: Exception) -> str:
    return f"the CUDA kernel needs NVRTC and cuda-core ({error}): pip install 'sphkv[cuda]'"


def _write_atomically(path: Path, content: bytes) -> None:
    """A reader sees the whole file or none, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".cubin-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
