"""The script that times whole decode steps runs without a GPU, on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the extra `hf` is not installed")
SCRIPT = Path(__file__).parents[3] / "examples" / "tokens_per_second.py"


def test_smoke_times_every_cache_and_writes_what_it_found(tmp_path: Path) -> None:
    output = tmp_path / "tokens.json"
    command = [sys.executable, str(SCRIPT), "--smoke", "--output", str(output), "--commit", "abc"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    assert report["commit"] == "abc"
    assert report["gpu"] == "none, smoke run"
    names = {"DynamicCache", "StaticCache", "polar-4222-r2"}
    cells = {(c["cache"], c["batch"], c["context"]): c for c in report["cells"]}
    assert set(cells) == {(name, b, n) for name in names for b in (1, 2) for n in (48, 100)}
    assert all(cell["tokens_per_second"] > 0 for cell in cells.values())
    coded, dense = cells["polar-4222-r2", 2, 100], cells["StaticCache", 2, 100]
    assert coded["cache_bytes"] < dense["cache_bytes"]
