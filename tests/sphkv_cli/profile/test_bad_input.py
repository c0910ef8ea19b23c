"""Bad input: one clear line, the right class, nothing half-written."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from sphkv_cli.artifacts.report import Report, as_json, save_report
from sphkv_cli.artifacts.store import content_digest
from sphkv_cli.errors import ArtifactError, SphkvError
from sphkv_cli.profile.html import write_html
from sphkv_cli.profile.options import ProfileOptions
from sphkv_cli.profile.result import ProfileReport
from sphkv_cli.profile.stage import profile

from .conftest import Run

REFERENCE = ProfileOptions(backend="reference")


def assert_refused(
    capture: Path, allocation: Path, output: Path, match: str, kind: type[SphkvError]
) -> None:
    before = sorted(output.parent.iterdir())
    with pytest.raises(kind, match=match) as caught:
        profile(REFERENCE, capture, allocation, output)
    assert "\n" not in str(caught.value)
    assert sorted(output.parent.iterdir()) == before


def test_a_broken_chain_says_what_to_remake(run: Run, other_run: Run, tmp_path: Path) -> None:
    assert_refused(
        other_run.capture,
        run.allocation,
        tmp_path / "r.json",
        r"made from another capture .*remake .*allocation\.h5",
        ArtifactError,
    )


def test_wrong_files_are_named(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    assert_refused(run.capture, run.codebooks, output, "holds codebooks, not ", ArtifactError)
    assert_refused(run.allocation, run.allocation, output, "holds allocation, not", ArtifactError)
    assert_refused(run.capture, tmp_path / "no.h5", output, "does not exist", ArtifactError)
    truncated = tmp_path / "cut.h5"
    truncated.write_bytes(run.allocation.read_bytes()[:3000])
    assert_refused(run.capture, truncated, output, "truncated or damaged", ArtifactError)


def test_nan_activations_name_document_layer_and_head(run: Run, tmp_path: Path) -> None:
    for name, head in (("keys", 1), ("values", 0), ("queries", 3)):
        damaged = tmp_path / f"{name}.h5"
        shutil.copy(run.capture, damaged)
        with h5py.File(damaged, "r+") as file:
            dataset = file[f"documents/005/layers/01/{name}"]
            dataset[-1, head, 5] = 0x7FC0  # bfloat16 NaN
        assert_refused(
            damaged,
            run.allocation,
            tmp_path / "r.json",
            f"NaN among the {name} of layer 1, head {head}",
            SphkvError,
        )


def test_an_existing_report_is_kept_without_force(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    output.write_text("mine")
    assert_refused(run.capture, run.allocation, output, "exists", ArtifactError)
    assert output.read_text() == "mine"
    profile(REFERENCE, run.capture, run.allocation, output, force=True)
    assert Report.open(output).header.kind == "report"


def test_a_foreign_allocation_of_the_same_capture_is_refused(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other.h5"
    shutil.copy(run.allocation, other)
    with h5py.File(other, "r+") as file:
        file.attrs["model_digest"] = "f" * 64
    assert_refused(run.capture, other, tmp_path / "r.json", "was changed after", ArtifactError)
    with h5py.File(other, "r+") as file:
        file.attrs["digest"] = content_digest(file)
    assert_refused(run.capture, other, tmp_path / "r.json", "is for the model", ArtifactError)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.update(version=99), "format version 99, this sphkv reads up to 1"),
        (lambda d: d.update(format="other"), "was not written by sphkv"),
        (lambda d: d.update(kind="capture"), "is a 'capture', not a report"),
        (lambda d: d.pop("inputs"), "damaged header"),
        (
            lambda d: d["content"]["profile"].update(model="another"),
            "was changed after it was written",
        ),
    ],
)
def test_damaged_reports_are_refused(
    report: ProfileReport, tmp_path: Path, change: object, match: str
) -> None:
    assert callable(change)
    document = json.loads(Path(report.path).read_text())
    change(document)
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=match):
        Report.open(damaged)


def test_a_truncated_report_is_refused(report: ProfileReport, tmp_path: Path) -> None:
    cut = tmp_path / "cut.json"
    cut.write_text(Path(report.path).read_text()[:-100])
    with pytest.raises(ArtifactError, match="truncated or no JSON"):
        Report.open(cut)
    with pytest.raises(ArtifactError, match="does not exist"):
        Report.open(tmp_path / "none.json")


def test_numbers_that_are_not_finite_are_null() -> None:
    assert as_json({"a": float("nan"), "b": np.array([1.5, np.inf])}) == {
        "a": None,
        "b": [1.5, None],
    }
    with pytest.raises(TypeError, match="no JSON form for object"):
        as_json(object())


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_report(tmp_path / "r.json", {"x": object()}, inputs={}, provenance={})
    assert list(tmp_path.iterdir()) == []


def test_the_page_is_whole_and_needs_no_network(report: ProfileReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots are an extra")
    page = tmp_path / "report.html"
    write_html(report, page)
    text = page.read_text()
    assert text.count("data:image/png;base64,iVBOR") == 3
    assert "http" not in text
    for candidate in report.content.candidates:
        assert candidate.name in text
    with pytest.raises(ArtifactError, match="exists"):
        write_html(report, page)
