"""report.json: what `profile` or `evaluate` found, with an artifact's header, as one document.

    {"format": "sphkv", "kind": "report", "version": 1, "digest": ..., "inputs": {...},
     "provenance": {...}, "content": {...}}

The digest is SHA-256 over the canonical JSON of `content` and of the inputs' digests.  A number
that is not finite is null.  FORMAT.md specifies the content.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sphkv_cli.artifacts.header import (
    FORMAT_NAME,
    MADE_BY,
    VERSIONS,
    ArtifactRef,
    Header,
    decode_inputs,
    encode_inputs,
)
from sphkv_cli.artifacts.store import artifact_ref, check_output, replaced_when_whole
from sphkv_cli.errors import ArtifactError

KIND = "report"


@dataclasses.dataclass(frozen=True)
class Report:
    """An opened report: header, and content as JSON has it (lists, dicts, None for NaN)."""

    path: Path
    header: Header
    content: Mapping[str, Any]

    @staticmethod
    def open(path: Path) -> "Report":
        """Read and check a report.

        Raises:
            ArtifactError: missing, damaged, foreign or newer file, or one whose digest does not
                match its content.
        """
        remake = f"make it again with `{MADE_BY[KIND]}`"
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise ArtifactError(
                f"{path} does not exist", f"make it with `{MADE_BY[KIND]}`"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} cannot be read ({error})", remake) from error
        try:
            document = json.loads(text)
        except ValueError as error:
            raise ArtifactError(f"{path} is truncated or no JSON ({error})", remake) from error
        if not isinstance(document, dict) or document.get("format") != FORMAT_NAME:
            raise ArtifactError(f"{path} was not written by sphkv", "check the path")
        if document.get("kind") != KIND:
            raise ArtifactError(f"{path} is a {document.get('kind')!r}, not a report", remake)
        try:
            version = int(document["version"])
            if version > VERSIONS[KIND]:
                raise ArtifactError(
                    f"{path} has report format version {version}, this sphkv reads up to "
                    f"{VERSIONS[KIND]}",
                    "upgrade sphkv",
                )
            inputs = decode_inputs(json.dumps(document["inputs"]))
            header = Header(KIND, version, str(document["digest"]), inputs, document["provenance"])
            content = document["content"]
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} has a damaged header ({error})", remake) from error
        if _digest(content, inputs) != header.digest:
            raise ArtifactError(f"{path} was changed after it was written", remake)
        return Report(path, header, content)

    @property
    def ref(self) -> ArtifactRef:
        """How artifacts made from this report name it."""
        return artifact_ref(self.path, self.header)


def save_report(
    path: Path,
    content: Any,
    *,
    inputs: Mapping[str, ArtifactRef],
    provenance: Mapping[str, Any],
    force: bool = False,
) -> ArtifactRef:
    """Write a report: a temporary file and one rename.

    Args:
        content: dataclasses, mappings, sequences, arrays and numbers; see `as_json`.

    Raises:
        ArtifactError: `path` exists and `force` is false, or it cannot be written.
    """
    check_output(path, force=force)
    plain = as_json(content)
    digest = _digest(plain, inputs)
    document = {
        "format": FORMAT_NAME,
        "kind": KIND,
        "version": VERSIONS[KIND],
        "digest": digest,
        "inputs": json.loads(encode_inputs(inputs)),
        "provenance": as_json(provenance),
        "content": plain,
    }
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return ArtifactRef(KIND, digest, path.name)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; raises ArtifactError."""
    with replaced_when_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def as_json(value: Any) -> Any:
    """A value as JSON has it: dataclasses and mappings to objects, arrays to lists, NaN to null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return as_json(value.tolist())
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    raise TypeError(f"no JSON form for {type(value).__name__}")


def _digest(content: Any, inputs: Mapping[str, ArtifactRef]) -> str:
    parents = {role: ref.digest for role, ref in sorted(inputs.items())}
    text = json.dumps([content, parents], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
