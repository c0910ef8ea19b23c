"""The script that times whole decode steps runs without a GPU, on a tiny model."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `hf` is not installed")
SCRIPT = Path(__file__).parents[3] / "examples" / "tokens_per_second.py"


def test_smoke_times_every_cache_and_writes_what_it_found(tmp_path: Path) -> None:
    output, link = tmp_path / "tokens.json", tmp_path / "link.json"
    output.write_text("a record")
    os.link(output, link)
    command = [sys.executable, str(SCRIPT), "--smoke", "--output", str(output), "--commit", "abc"]
    result = subprocess.run([*command, "--force"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    assert report["commit"] == "abc"
    assert report["model"] == "tiny" and report["gpu"] == "none, smoke run"
    names = {"DynamicCache", "StaticCache", "polar-4222-r2"}
    cells = {(c["cache"], c["batch"], c["context"]): c for c in report["cells"]}
    assert set(cells) == {(name, b, n) for name in names for b in (1, 2) for n in (48, 100)}
    assert all(cell["tokens_per_second"] > 0 for cell in cells.values())
    coded, dense = cells["polar-4222-r2", 2, 100], cells["StaticCache", 2, 100]
    assert coded["cache_bytes"] < dense["cache_bytes"]
    # Written in place, the other name of the old file would show the new text.
    assert link.read_text() == "a record" and len(list(tmp_path.iterdir())) == 2


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Any, str]]:
    """Exit code and last line of the script, which must end before it makes a model."""
    from transformers import AutoModelForCausalLM

    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = "made a model before its input was checked"
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda *_, **__: pytest.fail(made))

    def run(*arguments: str | Path) -> tuple[Any, str]:
        monkeypatch.setattr("sys.argv", [SCRIPT.name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return ended.value.code, capsys.readouterr().err.splitlines()[-1]

    return run


def test_without_a_gpu_it_says_where_to_run_it(refused: Callable[..., tuple[Any, str]]) -> None:
    code, line = refused("--model", "random-7b")
    assert code == 4 and line.startswith(f"{SCRIPT.name}: needs a CUDA GPU and torch sees none")
    assert line.endswith("run it where there is one, or pass --smoke")


def test_a_report_that_could_not_be_written_is_refused_before_anything_runs(
    refused: Callable[..., tuple[Any, str]], tmp_path: Path
) -> None:
    record = tmp_path / "record.json"
    record.write_text("a record")
    advice = "make it first, or choose another --output"
    for output, sentence in (
        (record, f"{record} exists; pass --force to overwrite it, or another --output"),
        (tmp_path, f"{tmp_path} is a folder; name a file with --output"),
        (tmp_path / "no" / "x.json", f"the folder {tmp_path / 'no'} does not exist; {advice}"),
    ):
        ended = refused("--smoke", "--commit", "abc", "--output", output)
        assert ended == (1, f"{SCRIPT.name}: {sentence}")
    assert record.read_text() == "a record"


def test_smoke_refuses_what_it_would_ignore(refused: Callable[..., tuple[Any, str]]) -> None:
    for name, value in (("batch", 1), ("context", 100), ("steps", 8), ("model", "smollm2")):
        code, line = refused("--smoke", f"--{name}", str(value))
        assert code == 2
        assert line.endswith(f"error: --smoke has a --{name} of its own: leave one of them out")


@pytest.mark.parametrize("option", ["--batch", "--context", "--steps"])
def test_numbers_of_a_measurement_are_at_least_one(
    option: str, refused: Callable[..., tuple[Any, str]]
) -> None:
    for value in ("0", "-1", "1.5", "many"):
        code, line = refused(option, value)
        assert code == 2
        sentence = f"argument {option}: {value!r} is not a whole number of 1 or more"
        assert line == f"{SCRIPT.name}: error: {sentence}"
