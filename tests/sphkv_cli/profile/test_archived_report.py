"""A report.json of format version 1, written once and kept: it must load for ever.

Never write it anew: a reader that cannot load it is the defect.
"""

import re
from pathlib import Path
from typing import Any

import pytest

import sphkv_cli.artifacts
from sphkv_cli.artifacts.report import Report, as_json
from sphkv_cli.profile.result import ProfileReport

ARCHIVED = Path(__file__).parent / "archive" / "report-v1.json"


def test_the_archived_report_loads_with_its_digest_and_numbers() -> None:
    report = Report.open(ARCHIVED)
    assert report.header.version == 1
    assert report.header.digest == (
        "dd15ce6e79db6acca60a1932d1ab2dae608b49a9d096b6597ff91573764826d2"
    )
    assert set(report.header.inputs) == {"capture", "allocation"}
    assert report.content["stage"] == "profile"
    content = report.content["profile"]
    names = [candidate["name"] for candidate in content["candidates"]]
    assert names == ["plan", "policy", "polar-3222-norm", "polar-42-fp16", "int8", "dense"]
    plan = content["candidates"][0]
    assert plan["laid_out_bytes"] == sum(plan["bytes"].values()) == 1718
    assert plan["heads"]["output_error"][0] == pytest.approx([0.16654732, 0.10818668])
    assert content["gates"][0]["passed"] is True


def test_a_new_report_has_every_key_of_the_archived_one(report: ProfileReport) -> None:
    old = Report.open(ARCHIVED).content["profile"]
    assert keys_of(old) <= keys_of(as_json(report.content)) | gate_keys()


def test_the_specification_names_every_key(report: ProfileReport) -> None:
    text = (Path(sphkv_cli.artifacts.__file__).parent / "FORMAT.md").read_text()
    section = text[text.index("## report, version 1") :]
    named = set(re.findall(r"`([a-z0-9_]+)`", section))
    for key in keys_of(as_json(report.content)) | gate_keys():
        assert key.split(".")[-1].removesuffix("[]") in named, key


def gate_keys() -> set[str]:
    """A report without limits has no gates to show their keys."""
    return {f"gates[].{name}" for name in ("name", "limit", "value", "where", "passed")}


def keys_of(value: Any, prefix: str = "") -> set[str]:
    """Paths of every key, lists as []."""
    if isinstance(value, dict):
        found = {f"{prefix}{key}" for key in value}
        for key, item in value.items():
            found |= keys_of(item, f"{prefix}{key}.")
        return found
    if isinstance(value, list) and value and isinstance(value[0], dict):
        base = prefix.removesuffix(".") + "[]."
        return set().union(*(keys_of(item, base) for item in value))
    return set()
