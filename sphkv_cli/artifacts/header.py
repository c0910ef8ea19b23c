"""What every artifact says of itself: kind, version, content digest, inputs, provenance."""

import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from sphkv_cli.artifacts.running_code import code_commit, code_version
from sphkv_cli.errors import ArtifactError

FORMAT_NAME = "sphkv"
VERSIONS = {"capture": 1, "codebooks": 2, "allocation": 2, "report": 1}
_DEPENDENCIES = ("torch", "numpy", "scipy", "h5py", "transformers")
MADE_BY = {
    "capture": "sphkv capture",
    "codebooks": "sphkv fit-codebooks",
    "allocation": "sphkv allocate",
    "report": "sphkv profile",
}


@dataclass(frozen=True)
class ArtifactRef:
    """Names an artifact by its content: kind, SHA-256 content digest, and the file name it had."""

    kind: str
    digest: str
    file_name: str

    def __post_init__(self) -> None:
        if self.kind not in VERSIONS:
            raise ValueError(f"unknown artifact kind {self.kind!r}")
        if len(self.digest) != 64 or set(self.digest) - set("0123456789abcdef"):
            raise ValueError(f"not a SHA-256 digest: {self.digest!r}")


@dataclass(frozen=True)
class Header:
    """The header of an artifact: `inputs` by role, `provenance` as written (never digested)."""

    kind: str
    version: int
    digest: str
    inputs: Mapping[str, ArtifactRef]
    provenance: Mapping[str, Any]


def require_input(header: Header, role: str, given: ArtifactRef, *, path: str) -> None:
    """Check that the artifact at `path` was made from `given`.

    Raises:
        ArtifactError: it was made from something else; says which file to remake.
    """
    made_from = header.inputs.get(role)
    if made_from is None:
        raise ArtifactError(
            f"{path} does not say which {role} it was made from",
            f"remake it with `{MADE_BY[header.kind]}`",
        )
    if made_from.digest != given.digest:
        raise ArtifactError(
            f"{path} was made from another {role} ({made_from.file_name}, digest "
            f"{made_from.digest[:12]}) than {given.file_name} (digest {given.digest[:12]})",
            f"remake {path} with `{MADE_BY[header.kind]}`, or pass the {role} it was made from",
        )


def collect_provenance(*, seed: int | None, command: list[str] | None = None) -> dict[str, Any]:
    """Commit, versions, machine and command line of this run, for the `provenance` group.

    The command line is recorded by file names alone, never by the folders of this machine.
    """
    import torch

    def version_of(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    words = sys.argv if command is None else command
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "seed": seed,
        "commit": code_commit(),
        "command": " ".join(["sphkv", *(word.rsplit("/", 1)[-1] for word in words[1:])]),
        "gpu": gpu,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "sphkv": code_version(),
            **{name: version_of(name) for name in _DEPENDENCIES},
        },
    }


def encode_inputs(inputs: Mapping[str, ArtifactRef]) -> str:
    """Inputs as canonical JSON: the attribute `inputs` of an artifact."""
    return json.dumps(
        {
            role: {"kind": ref.kind, "digest": ref.digest, "file_name": ref.file_name}
            for role, ref in inputs.items()
        },
        sort_keys=True,
    )


def decode_inputs(text: str) -> dict[str, ArtifactRef]:
    """Inverse of `encode_inputs`; raises ValueError, KeyError or TypeError on damage."""
    return {role: ArtifactRef(**fields) for role, fields in json.loads(text).items()}
