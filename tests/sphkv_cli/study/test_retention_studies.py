"""The studies of retention, page sizes and growing caches on a tiny captured model."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.codebooks import CodebooksReader
from sphkv_cli.blocks import Table
from sphkv_cli.capture.options import SyntheticOptions
from sphkv_cli.capture.synthetic import capture_synthetic
from sphkv_cli.errors import SphkvError, UsageError
from sphkv_cli.study import growing, page_sizes, retention, window_run
from sphkv_cli.study.inputs import StudyInputs, StudyOptions
from sphkv_cli.study.result import StudyResult


def run(
    study: Any, tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> StudyResult:
    from sphkv_cli.allocation.options import AllocateOptions

    if study is not page_sizes:
        module = study if study is retention else window_run
        monkeypatch.setattr(module, "AllocateOptions", partial(AllocateOptions, page_size=16))
    # The tiny documents have 150 tokens.
    asked = StudyOptions(max_documents=1, recall_prompts=0, horizon=40, window=32, **options)
    with CaptureReader(tiny_chain.capture) as reader:
        books = CodebooksReader.open(tiny_chain.codebooks)
        inputs = StudyInputs(asked, reader, books, str(tiny_chain.model))
        found: StudyResult = study.run(inputs)
    return found


def columns(table: Table) -> dict[str, list[Any]]:
    return {name: [row[i] for row in table.rows] for i, name in enumerate(table.columns)}


def test_retention_compares_at_no_more_than_the_budget(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(retention, tiny_chain, monkeypatch, budgets=("4b", "7b"), rows="all")
    found = columns(result.tables[0])
    for budget, rate in zip(found["budget"], found["laid-out b"], strict=True):
        assert rate <= float(budget[:-1])
    names = set(found["method"])
    assert {"plan", "policy", "oracle (ceiling)", "joint, no F", "joint, recency score"} <= names
    assert {"SnapKV, bf16", "PyramidKV, bf16", "Ada-KV, bf16", "joint, c_drop = 1"} <= names
    assert "7b" in result.reading[0]
    # Controls stand at one budget, all others at both.
    at = {
        name: [b for b, n in zip(found["budget"], found["method"], strict=True) if n == name]
        for name in names
    }
    assert at["plan"] == ["4b", "7b"]
    assert at["joint, c_drop = 1"] == at["joint, no F"] == ["4b"]


def test_retention_says_what_the_policys_bytes_are_and_which_goals_it_meets(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(retention, tiny_chain, monkeypatch, budgets=("4b", "7b"), rows="own")
    rows, parts, goals = result.tables
    methods, found = columns(rows), columns(parts)
    assert found["budget"] == ["4b", "7b"]
    for row in parts.rows:
        assert sum(row[5:]) == pytest.approx(100)
    kl = dict(
        zip(zip(methods["budget"], methods["method"], strict=True), methods["KL"], strict=True)
    )
    for budget, ratio in zip(found["budget"], found["KL policy / plan"], strict=True):
        assert ratio == pytest.approx(kl[budget, "policy"] / kl[budget, "plan"])
    for row, column in zip(
        goals.rows,
        ("KL policy / plan", "KL plan / oracle", "largest gap", "padding %", "page table %"),
        strict=True,
    ):
        assert row[2] == max(found[column])
        assert row[3] == ("met" if row[2] <= row[1] else "missed")


def test_growing_never_exceeds_its_budget_nor_the_solver_by_two_percent(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(growing, tiny_chain, monkeypatch, budgets=("3b", "6b"))
    found = columns(result.tables[0])
    assert found["steps over budget"] == [0] * 6
    assert all(end >= 1 for end in found["end over free"])
    assert max(found["worst over solver"]) <= 1.02
    assert min(found["worst over bound"]) >= 1


def test_page_sizes_account_for_every_byte(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(page_sizes, tiny_chain, monkeypatch, budgets=("4b",))
    found = columns(result.tables[0])
    assert found["page size"] == [16, 32, 64]
    for row in result.tables[0].rows:
        assert sum(row[4:9]) == pytest.approx(100)
        assert row[3] <= 4.0
    # The same tokens on fewer pages need fewer entries.
    assert found["page table %"][0] > found["page table %"][1] > found["page table %"][2]


def test_studies_of_plans_need_codebooks(tiny_chain: Any) -> None:
    with CaptureReader(tiny_chain.capture) as reader:
        for study in (retention, growing, page_sizes):
            with pytest.raises(UsageError, match="needs tiers"):
                study.run(StudyInputs(StudyOptions(), reader))


def test_a_study_that_runs_the_model_refuses_a_synthetic_capture(tmp_path: Path) -> None:
    path = tmp_path / "synthetic.h5"
    capture_synthetic(SyntheticOptions(1, 2, 1, 32, document_tokens=64), path)
    with CaptureReader(path) as reader, pytest.raises(SphkvError, match="is synthetic, there is"):
        _ = StudyInputs(StudyOptions(), reader).judged_model
