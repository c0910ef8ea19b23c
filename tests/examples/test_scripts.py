"""Scripts of examples/ refuse bad input in one line, before they measure and before they print."""

import importlib
import json
import os
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sphkv_cli.artifacts import running_code
from sphkv_kernels.timing import MemoryRates

EXAMPLES = Path(__file__).parents[2] / "examples"
TABLE, NEEDLE = (EXAMPLES / "results" / "smollm2" / f"{name}.json" for name in ("table", "needle"))
KERNEL, TOKENS = (
    EXAMPLES / "results" / f"{name}-h100.json" for name in ("kernel", "tokens-random-7b")
)
WRITERS = {
    "kernel_table.py": "examples/kernel_report.py",
    "one_table.py": "sphkv evaluate",
    "budget_table.py": "sphkv evaluate",
    "draw_evaluation.py": "sphkv evaluate",
}


@dataclass(frozen=True)
class Ended:
    """How a script ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.splitlines()[-1]


Script = Callable[..., Ended]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Runs a script by its name and arguments, as the command line does."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name: str, *arguments: str | Path) -> Ended:
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        code: Any = 0
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture
def kernel_report(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, on a machine with a GPU whose measurements are all empty."""
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("kernel_report")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    empty: dict[str, Any] = {
        "memory_rates": MemoryRates(3000.0, 2500.0),
        "dense_baselines": (),
        "fp8_sentence": "",
        "device_provenance": {"gpu": "none"},
    }
    for kind in ("single_tier", "mixed", "metadata", "position", "encode"):
        empty[f"{kind}_cases"] = ()
    for name, found in empty.items():
        monkeypatch.setattr(module, name, lambda *_, found=found: found)
    return module


@pytest.mark.parametrize(
    ("name", "output"), [("sanitize_kernel.py", False), ("kernel_report.py", True)]
)
def test_without_a_gpu_one_line_says_so_and_help_and_usage_still_work(
    name: str, output: bool, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    needed = ["--output", tmp_path / "report.json"] if output else []
    ended = script(name, *needed)
    wanted = f"{name}: needs a CUDA GPU and torch sees none; run it where there is one\n"
    assert (ended.code, ended.err) == (4, wanted)
    assert not list(tmp_path.iterdir())
    shown = script(name, "--help")
    assert shown.code == 0 and shown.out.startswith(f"usage: {name}")
    assert script(name, *needed, "--nosuch").code == 2


def test_a_report_that_could_not_be_written_is_refused_before_anything_is_measured(
    kernel_report: Any, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "record.json"
    record.write_text("a record")
    monkeypatch.setattr(torch, "randint", lambda *_, **__: pytest.fail("measured"))
    advice = "make it first, or choose another --output"
    for output, sentence in (
        (record, f"{record} exists; pass --force to overwrite it, or another --output"),
        (tmp_path, f"{tmp_path} is a folder; name a file with --output"),
        (tmp_path / "no" / "x.json", f"the folder {tmp_path / 'no'} does not exist; {advice}"),
    ):
        ended = script("kernel_report.py", "--output", output, "--commit", "abc")
        assert (ended.code, ended.err) == (1, f"kernel_report.py: {sentence}\n")
    assert record.read_text() == "a record" and list(tmp_path.iterdir()) == [record]


def test_a_forced_report_takes_the_place_of_the_old_one_when_it_is_whole(
    kernel_report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, link = tmp_path / "record.json", tmp_path / "link.json"
    record.write_text("a record")
    os.link(record, link)
    options = ["--output", str(record), "--force", "--commit", "abc"]
    monkeypatch.setattr("sys.argv", ["kernel_report.py", *options])
    kernel_report.main()
    assert json.loads(record.read_text())["provenance"]["commit"] == "abc"
    # Written in place, the other name of the old file would show the new text.
    assert link.read_text() == "a record" and len(list(tmp_path.iterdir())) == 2


def test_without_git_history_the_commit_is_asked_for(
    kernel_report: Any, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_code, "_ROOT", tmp_path)
    ended = script("kernel_report.py", "--output", tmp_path / "report.json")
    sentence = "kernel_report.py: no git history here; name the commit with --commit\n"
    assert (ended.code, ended.err) == (2, sentence)


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_no_report_of_the_writer_is_named_in_one_line(
    name: str, script: Script, tmp_path: Path
) -> None:
    if name == "draw_evaluation.py":
        pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    files = {"text": b"no JSON", "bytes": b"\xff\xfe\x00", "list": b"[]", "number": b"1"}
    files |= {"empty": b"{}", "null": b'{"content": null}', "string": b'{"content": "evaluation"}'}
    for key, content in files.items():
        (tmp_path / key).write_bytes(content)
    picture = [tmp_path / "picture.png"] if name == "draw_evaluation.py" else []
    another = TABLE if name == "kernel_table.py" else KERNEL
    others = [*map(tmp_path.joinpath, files), NEEDLE, TOKENS, another]
    reasons = {tmp_path / "missing": ": No such file or directory", tmp_path: ": Is a directory"}
    for path, reason in {**dict.fromkeys(others, ""), **reasons}.items():
        ended = script(name, path, *picture)
        line = f"{name}: error: {path} is no report of {WRITERS[name]}{reason}"
        assert (ended.code, ended.last_line) == (2, line)
        assert not ended.out and "Traceback" not in ended.err
    assert not any(path.exists() for path in picture)


@pytest.mark.parametrize(
    ("name", "good"), [("kernel_table.py", KERNEL), ("budget_table.py", TABLE)]
)
def test_a_table_is_printed_whole_or_not_at_all(
    name: str, good: Path, script: Script, tmp_path: Path
) -> None:
    ended = script(name, good, tmp_path / "missing")
    assert ended.code == 2 and not ended.out
    assert script(name, good).out.startswith("|" if good is TABLE else "NVIDIA")


@pytest.mark.parametrize(
    ("option", "writer"),
    [("--kernel={}", "examples/kernel_report.py"), ("--profile=2b={}", "sphkv profile")],
)
def test_speeds_of_the_one_table_come_from_reports_of_their_kind(
    option: str, writer: str, script: Script
) -> None:
    ended = script("one_table.py", TABLE, f"--kernel={KERNEL}", option.format(TABLE))
    assert ended.code == 2 and not ended.out
    assert ended.last_line == f"one_table.py: error: {TABLE} is no report of {writer}"


@pytest.mark.parametrize(
    ("name", "option"), [("one_table.py", "--family"), ("draw_evaluation.py", "--leave-out")]
)
def test_a_family_that_no_row_has_is_refused_and_those_there_are_named(
    name: str, option: str, script: Script, tmp_path: Path
) -> None:
    picture = []
    if name == "draw_evaluation.py":
        pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
        picture = [tmp_path / "picture.png"]
    ended = script(name, TABLE, *picture, option, "KIVI", option, "nosuch")
    assert ended.code == 2 and not ended.out
    assert "no rows of the family 'nosuch'; there is 'Ada-KV, bf16', 'KIVI'," in ended.last_line


def test_a_picture_that_cannot_be_drawn_is_refused_in_one_line(
    script: Script, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    for picture, code in ((tmp_path / "x.gif", 2), (tmp_path / "no" / "x.png", 1)):
        ended = script("draw_evaluation.py", TABLE, picture)
        assert ended.code == code and len(ended.err.splitlines()) == 1
        assert ended.err.startswith("draw_evaluation.py: ") and picture.name in ended.err
