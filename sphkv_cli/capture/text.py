"""Reads texts from files and JSON lines; says which file and line is wrong."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sphkv_cli.artifacts.capture_info import SPLITS, Split
from sphkv_cli.capture.options import TextSource
from sphkv_cli.errors import SphkvError


@dataclass(frozen=True)
class Text:
    """One source of documents: all of a file, or one JSON line.

    `is_row` marks a JSON line: a row that is too short is left out and counted, a file is refused.
    """

    name: str
    content: str
    split: Split | None
    is_row: bool

    @property
    def sha256(self) -> str:
        """SHA-256 of the UTF-8 text, hex."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def read_texts(sources: tuple[TextSource, ...], *, jsonl_field: str) -> Iterator[Text]:
    """Every text of the sources, in order.

    Raises:
        SphkvError: a file is missing, unreadable, empty or not UTF-8; a JSON line is not an object
            with `jsonl_field`; the message names file and line.
    """
    for source in sources:
        if source.kind == "jsonl":
            yield from _rows(source, jsonl_field)
        else:
            yield Text(source.path.name, read_text(source.path), source.split, is_row=False)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        SphkvError: it is missing, unreadable, not UTF-8, or blank.
    """
    content = _read(path)
    if not content.strip():
        raise SphkvError(f"{path} holds no text", "name a file with text")
    return content


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        hint = "check the path"
        if "=" in str(path):
            hint += f"; the splits are {', '.join(f'{split}=' for split in SPLITS)}"
        raise SphkvError(f"{path} does not exist", hint) from error
    except UnicodeDecodeError as error:
        raise SphkvError(
            f"{path} is not UTF-8 (byte {error.start})", "convert it, for example with iconv"
        ) from error
    except OSError as error:
        raise SphkvError(f"{path} cannot be read ({error.strerror})", "check the path") from error


def _rows(source: TextSource, field: str) -> Iterator[Text]:
    any_row = False
    # Not splitlines: JSON strings may hold other line separators (U+2028, U+0085) as they are.
    for number, line in enumerate(_read(source.path).split("\n"), start=1):
        if not line.strip():
            continue
        any_row = True
        place = f"{source.path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SphkvError(f"{place}: not JSON ({error})", "one JSON object per line") from error
        content = row.get(field) if isinstance(row, dict) else None
        if not isinstance(content, str):
            raise SphkvError(f"{place}: no text in field {field!r}", "pass --jsonl-field")
        split = row.get("split", source.split)
        if split is not None and split not in SPLITS:
            raise SphkvError(f"{place}: split {split!r}", f"one of {', '.join(SPLITS)}")
        yield Text(f"{source.path.name}:{number}", content, split, is_row=True)
    if not any_row:
        raise SphkvError(f"{source.path} holds no text", "name a file with JSON lines")
