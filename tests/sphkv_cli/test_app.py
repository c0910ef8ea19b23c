"""The shell: one clear line and the right exit code for every failure, JSON when asked."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from sphkv_cli.app import app
from sphkv_cli.artifacts.header import ArtifactRef
from sphkv_cli.artifacts.store import create_artifact
from sphkv_cli.errors import ArtifactError, EnvironmentUnable, GateFailed, SphkvError, UsageError
from sphkv_cli.render import TerminalProgress

RUNNER = CliRunner()


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stdout, result.stderr


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    path = tmp_path / "codes.h5"
    inputs = {"capture": ArtifactRef("capture", "ab" * 32, "the_capture.h5")}
    with create_artifact(path, "codebooks", inputs=inputs, provenance={"seed": 5}) as file:
        file.attrs["model"] = "tiny"
        for layer in range(3):
            file.create_dataset(f"layers/{layer:02d}/keys", data=[0.0]).attrs["axes"] = "n_tokens"
    return path


def test_help_names_every_command_and_the_exit_codes() -> None:
    stdout, _ = run("--help")
    for name in ("capture", "fit-codebooks", "allocate", "profile", "inspect", "doctor"):
        assert name in stdout
    assert "Exit codes" in stdout


def test_doctor_says_what_can_run_as_text_and_as_json() -> None:
    stdout, _ = run("doctor")
    assert "profile --backend cuda" in stdout
    found = json.loads(run("doctor", "--json")[0])
    assert {"subject", "ok", "finding", "mend"} == set(found["checks"][0])
    by_command = {row["command"]: row["ok"] for row in found["capabilities"]}
    assert by_command["capture --synthetic"] is True


def test_inspect_names_kind_inputs_provenance_and_datasets(artifact: Path) -> None:
    stdout, _ = run("inspect", artifact, "--verify")
    for text in ("codebooks, format version 1", "the_capture.h5", "tiny", "(verified)"):
        assert text in stdout
    found = json.loads(run("inspect", artifact, "--json")[0])
    assert found["datasets"] == [
        {
            "name": "layers/*/keys",
            "count": 3,
            "shape": [1],
            "dtype": "float64",
            "axes": "n_tokens",
            "n_bytes": 24,
        }
    ]
    assert found["digest_ok"] is None


def test_inspect_fails_on_a_changed_artifact(artifact: Path) -> None:
    import h5py

    with h5py.File(artifact, "r+") as file:
        file["layers/00/keys"][0] = 1.0
    stdout, _ = run("inspect", artifact, "--verify", code=1)
    assert "DOES NOT MATCH" in stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SphkvError("it broke", "mend it"), 1),
        (ArtifactError("it broke", "mend it"), 1),
        (UsageError("it broke", "mend it"), 2),
        (GateFailed("it broke", "mend it"), 3),
        (EnvironmentUnable("it broke", "mend it"), 4),
    ],
)
def test_every_error_is_one_line_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: SphkvError, code: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("sphkv_cli.inspection.stage.inspect_artifact", fail)
    stdout, stderr = run("inspect", "any.h5", code=code)
    assert stdout == ""
    assert stderr == "sphkv inspect: it broke; mend it\n"


def test_ctrl_c_is_one_line_and_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sphkv_cli.inspection.stage.inspect_artifact", interrupt)
    _, stderr = run("inspect", "any.h5", code=130)
    assert stderr.count("\n") == 1
    assert "interrupted" in stderr


def test_a_stage_that_stops_gives_the_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=100)
    monkeypatch.setattr("sphkv_cli.render.Console", lambda **_: terminal)
    with pytest.raises(KeyboardInterrupt), TerminalProgress() as progress:
        progress.start("measuring", 3, "layers")
        raise KeyboardInterrupt
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert hide in stream.getvalue()
    assert stream.getvalue().rindex(show) > stream.getvalue().rindex(hide)


def test_an_unforeseen_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("sphkv_cli.inspection.stage.inspect_artifact", fail)
    result = RUNNER.invoke(app, ["inspect", "any.h5"])
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize(
    "arguments",
    [
        ("capture",),
        ("capture", "--model", "smollm2", "--synthetic", "2x4x2x64"),
        ("capture", "--synthetic", "2x4x64"),
        ("capture", "--synthetic", "2x4x3x64"),
        ("capture", "--synthetic", "2x4x2x48"),
        ("capture", "--synthetic", "2x4x2x64", "--query-stride", "0"),
        ("capture", "--synthetic", "2x4x2x64", "--text-file", "text.txt"),
        ("capture", "--synthetic", "2x4x2x64", "--resume"),
        ("fit-codebooks",),
        ("fit-codebooks", "capture.h5", "--rotation", "random"),
        ("fit-codebooks", "capture.h5", "--seed", "-1"),
        ("allocate", "capture.h5", "codebooks.h5"),
        ("allocate", "capture.h5", "codebooks.h5", "--budget", "lots"),
        ("allocate", "capture.h5", "codebooks.h5", "--budget", "-3b"),
        ("allocate", "capture.h5", "codebooks.h5", "--budget", "3b", "--page-size", "48"),
        ("nonsense",),
    ],
)
def test_arguments_that_cannot_be_meant_exit_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    _, stderr = run(*arguments, code=2)
    assert stderr.strip()
    assert list(tmp_path.iterdir()) == []
