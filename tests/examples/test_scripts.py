"""Scripts of examples/ refuse bad input in one line, before they measure."""

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

from sphkv_kernels.timing import MemoryRates

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Ended:
    """How a script ended, and what it printed."""

    code: int
    out: str
    err: str


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
    for output, sentence in (
        (record, f"{record} exists; pass --force to overwrite it, or another --output"),
        (tmp_path, f"{tmp_path} is a folder; name a file with --output"),
        (tmp_path / "no" / "x.json", f"the folder {tmp_path / 'no'} does not exist; make it first"),
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
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    ended = script("kernel_report.py", "--output", tmp_path / "report.json")
    sentence = "kernel_report.py: no git history here; name the commit with --commit\n"
    assert (ended.code, ended.err) == (2, sentence)
