"""`sphkv fit-codebooks` from outside: exit codes, one line on stderr, JSON alone on stdout."""

import json
from collections.abc import Callable
from pathlib import Path

import h5py
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


def test_a_sweep_designs_at_every_rate(make_capture: Callable[..., Path], tmp_path: Path) -> None:
    capture = make_capture(n_tokens=100, n_layers=1)
    found = run(
        *(capture, "--output", tmp_path / "c.h5", "--sweep", "2:3:0.5", "--target-rate", "2.5"),
        *("--centring", "none", "--json"),
    )
    assert found.exit_code == 0, found.output
    design = json.loads(found.stdout)["design"]
    assert [row["rate"] for row in design["frontier"]] == [2.0, 2.5, 3.0]
    assert {row["target_rate"] for row in design["rows"]} == {2.0, 2.5, 3.0}
    assert sum(row["is_chosen"] for row in design["rows"]) == 3


@pytest.mark.parametrize(
    ("words", "exit_code", "says"),
    [
        (("--code", "9/2"), 2, "9 bits at level 1"),
        (("--code", "4/2/2/2/2/2/2"), 2, "7 levels"),
        (("--code", "4/2:norm"), 2, "norm"),
        (("--seed", "-3"), 2, "-3"),
        (("--target-rate", "0.1"), 2, "target rate is 0.1"),
        (("--target-rate", "3", "--code", "4/2"), 2, "--target-rate chooses"),
        (("--target-rate", "3", "--native-only"), 2, "CUDA kernel reads of head_dim 32"),
        (("--native-only",), 2, "--native-only restricts"),
        (("--sweep", "2:3"), 2, "LOW:HIGH:STEP"),
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


@pytest.mark.parametrize("bits", [0x7F00, 0x7F80])  # bfloat16: 1.7e38, whose norm is inf, and inf
def test_numbers_that_only_damage_explains_name_the_check_of_the_file(
    tiny_capture: Path, tmp_path: Path, bits: int
) -> None:
    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes(tiny_capture.read_bytes())
    with h5py.File(damaged, "r+") as file:
        for document in file["documents"].values():
            document["layers/01/values"][0] = bits
    found = run(damaged, "--output", tmp_path / "c.h5", "--code", "4/2:fp16")
    assert found.exit_code == 1, found.output
    assert f"`sphkv inspect --verify {damaged}` tells whether" in found.stderr
    assert found.stderr.count("\n") == 1
