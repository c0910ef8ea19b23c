"""Which code is running, for provenance: its version, and its commit where it is a git checkout."""

import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_GIT_TIMEOUT_S = 5.0


def code_version() -> str | None:
    """Of the installed package; where none is, of the checkout's pyproject.toml."""
    try:
        return metadata.version("sphkv")
    except metadata.PackageNotFoundError:
        described = _ROOT / "pyproject.toml"
        if not described.is_file():
            return None
        project = tomllib.loads(described.read_text(encoding="utf-8")).get("project", {})
        return project.get("version") if project.get("name") == "sphkv" else None


def code_commit() -> str | None:
    """The checkout's commit, "-dirty" after it where tracked files were changed; None without git.

    Only of a checkout whose root holds this package: one installed below another project's
    checkout is not that project's commit.
    """
    if not (_ROOT / ".git").exists():
        return None
    describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        done = subprocess.run(
            ("git", "--no-optional-locks", "-C", str(_ROOT), *describe),
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
