"""Studies are written whole or not at all, and none harms another."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sphkv_cli.app import app
from sphkv_cli.artifacts.report import Report
from sphkv_cli.blocks import Table
from sphkv_cli.errors import ArtifactError, SphkvError, UsageError
from sphkv_cli.plots.figures import Figure, PlotPanel, Series
from sphkv_cli.study import stage
from sphkv_cli.study.inputs import StudyInputs, StudyOptions
from sphkv_cli.study.registry import STUDIES, Study, studies_named
from sphkv_cli.study.result import StudyResult
from sphkv_cli.study.stage import run_studies
from sphkv_codebooks.errors import CodeError

FIGURE = Figure("line", "A line.", (PlotPanel("t", "x", "y", (Series("s", (0, 1), (1, 2)),)),))


def result(value: float = 1.5) -> StudyResult:
    return StudyResult((Table("Numbers", ("name", "x"), [("a", value)]),), (FIGURE,), ("A.", "B."))


@pytest.fixture
def make_study(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Study]:
    """A study under a real name whose function is given."""

    def make(name: str, run: Callable[[StudyInputs], StudyResult], *needs: str) -> Study:
        module = types.ModuleType(f"test_study_{name}")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return Study(name, "Why?", needs, module.__name__)  # type: ignore[arg-type]

    return make


def fails(_: StudyInputs) -> StudyResult:
    raise SphkvError("no such luck", "try again")


def everything_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_study_leaves_its_numbers_a_page_and_a_picture(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    report = run_studies([make_study("depth", lambda _: result())], StudyOptions(), output=tmp_path)
    assert everything_in(tmp_path) == {
        "README.md",
        "depth",
        "depth/README.md",
        "depth/line.png",
        "depth/result.json",
    }
    written = Report.open(tmp_path / "depth" / "result.json")  # checks the digest
    assert written.content["study"]["tables"][0]["rows"] == [["a", 1.5]]
    assert written.content["study"]["figures"][0]["panels"][0]["series"][0]["y"] == [1, 2]
    assert written.header.provenance["seed"] == 42
    page = (tmp_path / "depth" / "README.md").read_text()
    for said in ("Why?", "A.", "B.", "| a | 1.5 |", "line.png", written.header.digest[:12]):
        assert said in page
    assert (tmp_path / "depth" / "line.png").read_bytes().startswith(b"\x89PNG")
    assert report.outcomes[0].digest == written.header.digest


def test_a_failing_study_leaves_nothing_and_the_others_stay(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    studies = [
        make_study("depth", lambda _: result()),
        make_study("broken", fails),
        make_study("last", lambda _: result(2.5)),
    ]
    report = run_studies(studies, StudyOptions(), output=tmp_path)
    assert report.failures == ("broken: no such luck; try again",)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "depth", "last"}


def test_a_code_that_cannot_be_is_a_failure_of_its_study_alone(
    make_study: Callable[..., Study],
) -> None:
    def cannot(_: StudyInputs) -> StudyResult:
        raise CodeError("depth 9 is out of range")

    report = run_studies([make_study("depth", cannot)], StudyOptions())
    assert report.failures == ("depth: depth 9 is out of range",)


def test_an_interrupted_study_leaves_what_was_there_before(
    make_study: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study("depth", lambda _: result())
    run_studies([study], StudyOptions(), output=tmp_path)
    before = Report.open(tmp_path / "depth" / "result.json").header.digest

    def interrupted(_: Figure, path: Path) -> None:
        path.write_bytes(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "draw", interrupted)
    again = make_study("depth", lambda _: result(9.0))
    with pytest.raises(KeyboardInterrupt):
        run_studies([again], StudyOptions(), output=tmp_path, force=True)
    assert Report.open(tmp_path / "depth" / "result.json").header.digest == before
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "depth"}


def test_force_replaces_a_whole_study(make_study: Callable[..., Study], tmp_path: Path) -> None:
    run_studies([make_study("depth", lambda _: result())], StudyOptions(), output=tmp_path)
    again = make_study("depth", lambda _: result(9.0))
    with pytest.raises(ArtifactError, match="--force"):
        run_studies([again], StudyOptions(), output=tmp_path)
    run_studies([again], StudyOptions(), output=tmp_path, force=True)
    assert "| a | 9 |" in (tmp_path / "depth" / "README.md").read_text()


def test_a_study_without_its_capture_is_refused_alone_and_skipped_among_all(
    make_study: Callable[..., Study],
) -> None:
    study = make_study("depth", lambda _: result(), "capture")
    with pytest.raises(UsageError, match="--capture"):
        run_studies([study], StudyOptions())
    (outcome,) = run_studies([study], StudyOptions(), skip_unmet=True).outcomes
    assert outcome.result is None and "--capture" in outcome.skipped


def test_a_study_without_its_codebooks_is_refused_alone_and_skipped_among_all(
    make_study: Callable[..., Study],
) -> None:
    study = make_study("growing", lambda _: result(), "codebooks")
    with pytest.raises(UsageError, match="--codebooks"):
        run_studies([study], StudyOptions())
    (outcome,) = run_studies([study], StudyOptions(), skip_unmet=True).outcomes
    assert outcome.result is None and "--codebooks" in outcome.skipped


def test_every_study_has_a_module_with_run_and_a_name_of_its_own() -> None:
    import importlib

    assert len({study.name for study in STUDIES}) == len(STUDIES) > 0
    for study in STUDIES:
        assert callable(importlib.import_module(study.module).run)
        assert study.question.endswith("?")


def test_names_are_checked_before_anything_runs() -> None:
    for names, every in (((), False), (("nothing",), False), (("depth",), True)):
        with pytest.raises(UsageError):
            studies_named(names, every=every)


def test_the_command_lists_refuses_and_speaks_json() -> None:
    listed = CliRunner().invoke(app, ["study", "--list", "--json"])
    assert [row["name"] for row in json.loads(listed.stdout)] == [study.name for study in STUDIES]
    for words, says in (
        (["nothing"], "choose among"),
        ([], "--all"),
        (["depth", "--max-queries", "0"], "--max-queries"),
    ):
        found = CliRunner().invoke(app, ["study", *words])
        assert found.exit_code == 2
        assert says in found.stderr and found.stderr.count("\n") == 1


def test_a_damaged_neighbour_costs_a_study_nothing(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    (tmp_path / "gaussianity").mkdir()
    (tmp_path / "gaussianity" / "result.json").write_text("{half")
    report = run_studies([make_study("depth", lambda _: result())], StudyOptions(), output=tmp_path)
    assert not report.failures
    assert "cannot be read" in (tmp_path / "README.md").read_text()
