"""The shell: one clear line and the right exit code for every failure, JSON when asked."""

import importlib.metadata
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest
from rich.console import Console
from typer.models import ArgumentInfo
from typer.testing import CliRunner

from sphkv_cli.app import app
from sphkv_cli.errors import ArtifactError, EnvironmentUnable, GateFailed, SphkvError, UsageError
from sphkv_cli.fit.options import FitOptions
from sphkv_cli.render import TerminalProgress

RUNNER = CliRunner()


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stdout, result.stderr


HERE = Path(__file__).parent
ARCHIVED = {
    "capture": HERE / "capture/archive/capture-v1.h5",
    "codebooks": HERE / "fit/archive/codebooks-v1.h5",
    "allocation": HERE / "allocation/archive/allocation-v1.h5",
    "report": HERE / "profile/archive/report-v1.json",
}
"""One artifact of each kind as version 1 wrote it."""


def test_help_names_every_command_and_the_exit_codes() -> None:
    stdout, _ = run("--help")
    for name in ("capture", "fit-codebooks", "allocate", "profile", "inspect", "doctor", "study"):
        assert name in stdout
    assert "Exit codes" in stdout


def test_version_is_the_installed_one() -> None:
    assert run("--version")[0] == f"sphkv {importlib.metadata.version('sphkv')}\n"


def test_doctor_says_what_can_run_as_text_and_as_json() -> None:
    stdout, _ = run("doctor")
    assert "profile --backend cuda" in stdout
    found = json.loads(run("doctor", "--json")[0])
    assert {"subject", "ok", "finding", "mend"} == set(found["checks"][0])
    by_command = {row["command"]: row["ok"] for row in found["capabilities"]}
    assert by_command["capture --synthetic"] is True


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("capture", ("Documents", "judge", "Layers")),
        ("codebooks", ("frames: rotation", "tiers: ", "D predicted")),
        ("allocation", ("Plans", "gap", "drop", "dense")),
        ("report", ("Report of profile", "plan", "output error")),
    ],
)
def test_inspect_shows_what_an_artifact_is_and_its_main_tables(
    kind: str, said: tuple[str, ...]
) -> None:
    stdout, _ = run("inspect", ARCHIVED[kind], "--verify")
    for text in (f"{kind}, format version 1", "(verified)", *said):
        assert text in stdout
    found = json.loads(run("inspect", ARCHIVED[kind], "--json")[0])
    assert found["header"]["kind"] == kind
    assert found["tables"]


def test_inspect_joins_datasets_that_differ_in_a_number() -> None:
    found = json.loads(run("inspect", ARCHIVED["capture"], "--json")[0])
    names = [dataset["name"] for dataset in found["datasets"]]
    assert "documents/*/layers/*/keys" in names
    assert len(names) == len(set(names))
    assert found["digest_ok"] is None


def test_inspect_fails_on_a_changed_artifact(tmp_path: Path) -> None:
    import h5py

    path = tmp_path / "codebooks.h5"
    path.write_bytes(ARCHIVED["codebooks"].read_bytes())
    with h5py.File(path, "r+") as file:
        file["frames/key_mean"][0, 0, 0] += 1.0
    stdout, _ = run("inspect", path, "--verify", code=1)
    assert "DOES NOT MATCH" in stdout


DAMAGES = {
    "zeros": lambda content: content[:2048] + bytes(3952) + content[6000:],
    "flips": lambda content: bytes(
        byte ^ 0x5A if place > 4096 and place % 97 == 0 else byte
        for place, byte in enumerate(content)
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["capture", "codebooks", "allocation"])
def test_a_damaged_artifact_is_one_line(tmp_path: Path, kind: str, damage: str) -> None:
    path = tmp_path / "it.h5"
    path.write_bytes(DAMAGES[damage](ARCHIVED[kind].read_bytes()))
    _, stderr = run("inspect", path, "--verify", code=1)
    assert stderr.startswith(f"sphkv inspect: {path} ")
    assert "damaged" in stderr
    assert "make it again" in stderr or "remake it" in stderr
    assert stderr.count("\n") == 1


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


def test_ctrl_c_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("3 documents are kept")

    monkeypatch.setattr("sphkv_cli.inspection.stage.inspect_artifact", interrupt)
    _, stderr = run("inspect", "any.h5", code=130)
    assert stderr == "sphkv inspect: interrupted, 3 documents are kept\n"


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


TWO_OUTPUTS = [
    (("profile", "capture.h5", "allocation.h5"), "--html"),
    (("profile", "--synthetic", "1x1x64x1"), "--plot"),
    (("allocate", "capture.h5", "codebooks.h5", "--budget", "3b"), "--plot"),
    (("evaluate", "capture.h5"), "--plot"),
    (("evaluate", "capture.h5", "--probe", "needle"), "--plot"),
    (("compare", "capture.h5"), "--plot"),
]
"""Commands with a second output, and the option that names it; their inputs do not exist."""


@pytest.mark.parametrize(("arguments", "option"), TWO_OUTPUTS)
def test_two_outputs_are_two_files_or_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "both.png"
    path.write_text("mine")
    given = (*arguments, "--output", "both.png", option, path, "--force")
    _, stderr = run(*given, code=2)
    expected = f"--output and {option} name the same file, {path}; give two names\n"
    assert stderr == f"sphkv {arguments[0]}: {expected}"
    assert path.read_text() == "mine"


@pytest.mark.parametrize(("arguments", "option"), TWO_OUTPUTS)
def test_an_output_that_cannot_be_written_is_named_by_its_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.png").write_text("mine")
    for name, said in (
        ("mine.png", f"mine.png exists; pass --force to overwrite it, or another {option}"),
        (".", f". is a folder; name a file with {option}"),
        ("no/a.png", f"the folder no does not exist; make it first, or choose another {option}"),
        ("/dev/null", f"/dev/null is not a regular file; name another {option}"),
    ):
        _, stderr = run(*arguments, "--output", "new", option, name, code=1)
        assert stderr == f"sphkv {arguments[0]}: {said}\n"


WITH_A_PLOT = [(arguments, option) for arguments, option in TWO_OUTPUTS if option == "--plot"]


@pytest.mark.parametrize(("arguments", "option"), WITH_A_PLOT)
@pytest.mark.parametrize("name", ["a.txt", "a.pdf", "a"])
def test_a_plot_is_a_png_or_an_svg_or_nothing_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    option: str,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    _, stderr = run(*arguments, "--output", "new", option, name, code=2)
    said = f"--plot {name} is neither .png nor .svg; end it in one of them\n"
    assert stderr == f"sphkv {arguments[0]}: {said}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", sorted({arguments[0] for arguments, _ in WITH_A_PLOT}))
def test_every_help_names_the_pictures_in_the_same_words(
    monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert run(command, "--help")[0].count("to this .png or .svg.") == 1


WRITTEN = ("output", "plot", "html")
"""Parameters that name a file to write; every other path of a command that has --force is read."""

ALSO_NEEDED = {"allocate": ("--budget", "3b")}

READ_BY_NAME = [
    (("capture", "--model", "smollm2", "--text-file", "it.h5"), "--text-file it.h5", "--output"),
    (
        ("capture", "--model", "smollm2", "--text-file", "fit=it.h5"),
        "--text-file it.h5",
        "--output",
    ),
    (("capture", "--model", "smollm2", "--jsonl", "judge=it.h5"), "--jsonl it.h5", "--output"),
    (("capture", "--model", "it.h5", "--text-file", "other.txt"), "--model", "--output"),
    (("evaluate", "other.h5", "--model", "it.h5"), "--model", "--output"),
]
"""Files that are read though their parameters are text."""


def read_and_written() -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Of every command, each file read with each file written: a line, and what names the two."""
    for registered in app.registered_commands:
        name, function = str(registered.name), registered.callback
        hints = get_type_hints(function, include_extras=True)
        if "force" not in hints or name == "study":  # it writes folders: the test after the next
            continue
        paths = {key: hint for key, hint in hints.items() if "Path" in str(hint)}
        arguments = [k for k in paths if isinstance(paths[k].__metadata__[0], ArgumentInfo)]
        for read, written in itertools.product(paths.keys() - WRITTEN, paths.keys() & WRITTEN):
            if (name, written) == ("profile", "plot"):  # with --synthetic, which reads nothing
                continue
            given = ["it.h5" if key == read else "other.h5" for key in arguments]
            if read not in arguments:
                given += [f"--{read}", "it.h5"]
            names = (read.upper() if read in arguments else f"--{read}", f"--{written}")
            yield (name, *ALSO_NEEDED.get(name, ()), *given), *names


@pytest.mark.parametrize(
    ("arguments", "read", "written"), [*sorted(read_and_written()), *READ_BY_NAME]
)
@pytest.mark.parametrize("spelt", ["it.h5", "./it.h5", "link.h5"])
def test_no_command_overwrites_what_it_reads(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    read: str,
    written: str,
    spelt: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it.h5").write_text("mine")
    (tmp_path / "link.h5").symlink_to("it.h5")
    _, stderr = run(*arguments, written, spelt, "--force", code=2)
    said = f"{read} and {written} name the same file, {Path(spelt)}; give two names\n"
    assert stderr == f"sphkv {arguments[0]}: {said}"
    assert (tmp_path / "it.h5").read_text() == "mine"


@pytest.mark.parametrize("option", ["--capture", "--codebooks", "--model"])
def test_no_study_replaces_a_folder_with_what_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "out" / "vector-search" / "it.h5"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    given = ("--capture", "other.h5", "--codebooks", "other.h5", option, kept)
    _, stderr = run("study", "vector-search", *given, "--output", "out", "--force", code=2)
    said = f"{option} {kept} lies in out/vector-search, which is replaced; name another --output\n"
    assert stderr == f"sphkv study: {said}"
    assert kept.read_text() == "mine"


MEASURED = ("profile", "capture.h5", "allocation.h5")
TIMED = ("profile", "--synthetic", "1x1x64x1")
RECORDED = ("capture", "--model", "smollm2", "--text-file", "a.txt")
EVALUATED = ("evaluate", "capture.h5")
NEEDLE = (*EVALUATED, "--probe", "needle")
COPY_BACK = (*EVALUATED, "--probe", "copy-back")
FITTED = ("fit-codebooks", "capture.h5", "--centring")


@pytest.mark.parametrize(
    ("arguments", "option", "where"),
    [
        (MEASURED, ("--head-dim", "128"), "without --synthetic"),
        (MEASURED, ("--page-size", "32"), "without --synthetic"),
        (MEASURED, ("--code", "3/2/2/2:r2"), "without --synthetic"),
        (MEASURED, ("--sweep",), "without --synthetic"),
        (MEASURED, ("--plot", "a.png"), "without --synthetic"),
        (TIMED, ("--max-queries", "256"), "with --synthetic"),
        (TIMED, ("--html", "a.html"), "with --synthetic"),
        (TIMED, ("--tier", "int8"), "with --synthetic"),
        (TIMED, ("--max-kl", "0.1"), "with --synthetic"),
        (("capture", "--synthetic", "2x4x2x64"), ("--jsonl", "a"), "with --synthetic"),
        (("capture", "--synthetic", "2x4x2x64"), ("--min-tokens", "64"), "with --synthetic"),
        (("capture", "--synthetic", "2x4x2x64"), ("--device", "auto"), "with --synthetic"),
        (RECORDED, ("--fisher-samples", "2"), "without --fisher"),
        (RECORDED, ("--fisher-tokens", "2048"), "without --fisher"),
        (EVALUATED, ("--probe-length", "512"), "without --probe"),
        (EVALUATED, ("--probe-depth", "0"), "without --probe"),
        (EVALUATED, ("--probe-keys", "4"), "without --probe"),
        (EVALUATED, ("--probe-values", "1"), "without --probe"),
        (EVALUATED, ("--probe-prompts", "4"), "without --probe"),
        (EVALUATED, ("--gate-recall", "0.9"), "without --probe"),
        (NEEDLE, ("--probe-keys", "4"), "with --probe needle"),
        (COPY_BACK, ("--probe-depth", "0"), "with --probe copy-back"),
        (NEEDLE, ("--budget", "2b"), "with --probe"),
        (NEEDLE, ("--rows", "own"), "with --probe"),
        (NEEDLE, ("--context", "64"), "with --probe"),
        (NEEDLE, ("--max-documents", "1"), "with --probe"),
        (NEEDLE, ("--stepwise",), "with --probe"),
        (NEEDLE, ("--by-position",), "with --probe"),
        (NEEDLE, ("--gate-kl", "0.1"), "with --probe"),
        (NEEDLE, ("--gate-top1", "0.9"), "with --probe"),
        (NEEDLE, ("--gate-perplexity", "1.1"), "with --probe"),
        ((*FITTED, "none"), ("--rope-pairs", "4"), "with --centring none"),
        ((*FITTED, "post_rope"), ("--rope-pairs", "4"), "with --centring post_rope"),
    ],
)
def test_an_option_of_another_mode_is_refused_also_at_its_default(
    arguments: tuple[str, ...], option: tuple[str, ...], where: str
) -> None:
    _, stderr = run(*arguments, *option, code=2)
    said = f"{option[0]} has no meaning {where}; leave it out\n"
    assert stderr == f"sphkv {arguments[0]}: {said}"


def test_a_sweep_and_target_rates_are_designed_for_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fit(options: FitOptions, *_: object, **__: object) -> None:
        raise SphkvError(f"rates {options.target_rates}")

    monkeypatch.setattr("sphkv_cli.fit.stage.fit_codebooks", fit)
    _, stderr = run(
        *("fit-codebooks", "capture.h5", "--target-rate", "3.5", "--sweep", "2:3:1"), code=1
    )
    assert "rates (2.0, 3.0, 3.5)" in stderr
