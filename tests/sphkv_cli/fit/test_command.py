"""`sphkv fit-codebooks` from outside: exit codes, one line on stderr, JSON alone on stdout."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sphkv_cli.app import app


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["fit-codebooks", *map(str, words)])


def test_json_is_all_that_stdout_carries(tiny_capture: Path, tmp_path: Path) -> None:
    output = tmp_path / "c.h5"
    found = run(tiny_capture, "--output", output, "--code", "4/2:r2", "--json")
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["tiers"] == ["polar-42-r2"]
    assert result["tables"]["codes"][0]["predicted_distortion"] > 0
    assert output.exists()


@pytest.mark.parametrize(
    ("words", "exit_code", "says"),
    [
        (("--code", "9/2"), 2, "9 bits at level 1"),
        (("--code", "4/2/2/2/2/2/2"), 2, "7 levels"),
        (("--code", "4/2:norm"), 2, "norm"),
        (("--seed", "-3"), 2, "-3"),
    ],
)
def test_bad_words_are_one_line_and_a_usage_error(
    tiny_capture: Path, tmp_path: Path, words: tuple[str, ...], exit_code: int, says: str
) -> None:
    output = tmp_path / "c.h5"
    found = run(tiny_capture, "--output", output, *words)
    assert found.exit_code == exit_code
    assert says in found.stderr
    assert found.stderr.count("\n") == 1
    assert not output.exists()


def test_bad_files_are_one_line_and_a_failure(tiny_capture: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.h5"
    truncated.write_bytes(tiny_capture.read_bytes()[:3000])
    taken = tmp_path / "taken.h5"
    taken.write_bytes(b"something")
    for words, says in (
        ((tmp_path / "nothing.h5", "--output", tmp_path / "c.h5"), "does not exist"),
        ((truncated, "--output", tmp_path / "c.h5"), "truncated or damaged"),
        ((tiny_capture, "--output", taken), "--force"),
        ((tiny_capture, "--output", tmp_path / "no" / "c.h5"), "does not exist"),
    ):
        found = run(*words)
        assert found.exit_code == 1
        assert says in found.stderr
        assert found.stderr.count("\n") == 1
    assert taken.read_bytes() == b"something"
    assert not (tmp_path / "c.h5").exists()
