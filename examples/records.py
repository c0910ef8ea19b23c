"""Opens recorded reports for the scripts that print or draw them."""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_PARTS: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "examples/kernel_report.py": ((), frozenset({"provenance", "rates", "cases", "mixed"})),
    "sphkv evaluate": (("content", "evaluation"), frozenset({"model", "rows"})),
    "sphkv profile": (("content", "profile"), frozenset({"speed"})),
}
"""By writer of a report: the keys that lead to what is read, and names that are there."""


def recorded(parser: argparse.ArgumentParser, path: Path, writer: str) -> dict[str, Any]:
    """What `writer` found, as `path` records it; a usage error where that is no such report."""
    keys, names = _PARTS[writer]
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"{path} is no report of {writer}: {error.strerror}")
    except ValueError:
        found = None  # no JSON, or no text
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not names <= found.keys():
        parser.error(f"{path} is no report of {writer}")
    return found


def require_families(
    parser: argparse.ArgumentParser, asked: Iterable[str], rows: Iterable[Mapping[str, Any]]
) -> None:
    """A usage error for a family that no row has."""
    known = {row["family"] for row in rows}
    for family in asked:
        if family not in known:
            there = ", ".join(map(repr, sorted(known)))
            parser.error(f"no rows of the family {family!r}; there is {there}")
