"""Provenance names the code that ran: its commit and version, or nothing rather than another's."""

import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from sphkv_cli.artifacts import running_code
from sphkv_cli.artifacts.header import collect_provenance
from sphkv_cli.artifacts.running_code import code_commit, code_version


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout of one commit, as the root of the running code."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    (tmp_path / "code.py").write_text("one")
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    for words in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "one")):
        subprocess.run(("git", "-C", str(tmp_path), *words), check=True)
    monkeypatch.setattr(running_code, "_ROOT", tmp_path)
    return tmp_path


def test_provenance_has_the_commit_and_says_what_was_changed_after_it(checkout: Path) -> None:
    commit = collect_provenance(seed=1)["commit"]
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (checkout / "report.json").write_text("an output is no change of the code")
    subprocess.run(("git", "-C", str(checkout), "tag", "v1"), check=True)
    assert code_commit() == commit
    (checkout / "code.py").write_text("two")
    assert code_commit() == f"{commit}-dirty"


def test_code_inside_another_checkout_has_no_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "site-packages").mkdir()
    monkeypatch.setattr(running_code, "_ROOT", checkout / "site-packages")
    assert code_commit() is None


def test_without_git_or_with_a_damaged_checkout_there_is_no_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / ".git" / "HEAD").unlink()
    assert code_commit() is None
    monkeypatch.setenv("PATH", "")
    assert code_commit() is None


def test_the_version_of_code_that_is_not_installed_is_that_of_its_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_installed(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_installed)
    assert collect_provenance(seed=1)["versions"]["sphkv"] == code_version() is not None
    monkeypatch.setattr(running_code, "_ROOT", tmp_path)
    assert code_version() is None
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "9"\n')
    assert code_version() is None
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "sphkv"\nversion = "9"\n')
    assert code_version() == "9"
