"""`evaluate` with plans made anew: other budgets, lengths, methods and captures."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest

from sphkv_cli.allocation.options import AllocateOptions
from sphkv_cli.allocation.stage import allocate
from sphkv_cli.artifacts.store import content_digest
from sphkv_cli.capture.options import CaptureOptions, TextSource
from sphkv_cli.capture.stage import capture
from sphkv_cli.errors import ArtifactError, UsageError
from sphkv_cli.evaluation import stage
from sphkv_cli.evaluation.fresh_retention import fresh_work
from sphkv_cli.evaluation.options import EvaluateOptions
from sphkv_cli.evaluation.retention_rows import ORACLE, PLAN, POLICY
from sphkv_cli.evaluation.stage import evaluate


def test_a_longer_capture_of_the_same_model_is_planned_anew_within_the_budget(
    tiny_chain: Any, tmp_path: Path
) -> None:
    texts = []
    for split in ("fit", "select", "judge"):
        path = tmp_path / f"{split}.txt"
        path.write_text(" ".join(f"{split} {i * i + 1}" for i in range(120)))
        texts.append(TextSource.parse(f"{split}={path}"))
    longer = tmp_path / "longer.h5"
    # Twice as long as the documents of the fit.
    options = CaptureOptions(model=str(tiny_chain.model), texts=tuple(texts), document_tokens=300)
    capture(options, longer)
    result = evaluate(
        EvaluateOptions(max_documents=1, model=str(tiny_chain.model)),
        longer,
        None,
        tiny_chain.allocation,
        tmp_path / "a.json",
    )
    rows = {row.name: row for row in result.rows}
    assert {PLAN, POLICY, ORACLE} <= set(rows)
    assert rows[POLICY].is_ours and not rows[ORACLE].is_ours
    assert any("learned nothing from judge.txt is not checked" in one for one in result.reading)
    for name in (PLAN, POLICY, ORACLE):
        assert 3.5 < rows[name].coded_laid_out_rate <= 4.0
        assert rows[name].documents[0].n_tokens == 300
        assert rows[name].documents[0].n_scored == 39
    # The dense control differs from the dense run by float32 rounding alone.
    assert result.rows[-1].kl.mean < 1e-6


def test_budgets_and_context_are_those_asked_for(tiny_chain: Any, tmp_path: Path) -> None:
    options = EvaluateOptions(
        budgets=("3b", "6b"),
        rows="published",
        context=100,
        max_documents=1,
        model=str(tiny_chain.model),
    )
    result = evaluate(options, tiny_chain.capture, None, tiny_chain.allocation, tmp_path / "b.json")
    rates = {row.name: row.coded_laid_out_rate for row in result.rows}
    assert 2.5 < rates[f"{POLICY}, 3b"] <= 3.0 < rates[f"{POLICY}, 6b"] <= 6.0
    assert rates["SnapKV, bf16, 3b"] <= 3.0
    assert result.rows[0].documents[0].n_scored == 150 - 100 - 1


def test_a_row_that_does_not_fit_every_document_is_left_out_and_named(
    tiny_chain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = []

    def first_without_oracle(*arguments: Any) -> Any:
        of_all = fresh_work(*arguments)

        def work(index: int) -> Any:
            found = of_all(index)
            planned.append(index)
            if index != planned[0]:
                return found
            kept = tuple(c for c in found.candidates if not c.row.startswith(ORACLE))
            return replace(found, candidates=kept)

        return work

    monkeypatch.setattr(stage, "fresh_work", first_without_oracle)
    result = evaluate(
        EvaluateOptions(budgets=("6b",), context=100, model=str(tiny_chain.model)),
        tiny_chain.capture,
        None,
        tiny_chain.allocation,
        tmp_path / "c.json",
    )
    assert len(set(planned)) == result.n_documents > 1
    assert [row.name for row in result.rows] == [PLAN, POLICY, "dense"]
    assert all(len(row.documents) == result.n_documents for row in result.rows)
    assert any("left out" in one and ORACLE in one for one in result.reading)


def test_the_report_says_when_quotas_can_only_be_scaled(tiny_chain: Any, tmp_path: Path) -> None:
    old = tmp_path / "old.h5"
    shutil.copy(tiny_chain.allocation, old)
    with h5py.File(old, "r+") as file:
        for name in ("fit", "price_rates", "price_of_drop", "price_of_code"):
            del file["policy"][name]
        file.attrs["digest"] = content_digest(file)
    options = EvaluateOptions(budgets=("6b",), max_documents=1, model=str(tiny_chain.model))
    policies = []
    for path, is_said in ((tiny_chain.allocation, False), (old, True)):
        result = evaluate(options, tiny_chain.capture, None, path, tmp_path / f"{is_said}.json")
        assert any("are scaled to every budget" in one for one in result.reading) == is_said
        policies.append(next(row.kl.mean for row in result.rows if row.name == POLICY))
    assert policies[0] != policies[1]


def test_new_plans_need_an_allocation_of_the_same_model(tiny_chain: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="plan a context"):
        evaluate(
            EvaluateOptions(rows="own"),
            tiny_chain.capture,
            tiny_chain.codebooks,
            None,
            tmp_path / "c.json",
        )
    with pytest.raises(UsageError, match="--context"):
        EvaluateOptions(context=0)
    with pytest.raises(UsageError, match="budget"):
        EvaluateOptions(budgets=("much",))


def test_another_model_is_refused(tiny_chain: Any, tmp_path: Path) -> None:
    from sphkv_cli.artifacts.allocation import AllocationReader
    from sphkv_cli.artifacts.capture import CaptureReader
    from sphkv_cli.capture.options import SyntheticOptions
    from sphkv_cli.capture.synthetic import capture_synthetic
    from sphkv_cli.evaluation.fresh_retention import require_same_model

    other = tmp_path / "other.h5"
    capture_synthetic(
        SyntheticOptions(
            n_layers=2, n_q_heads=4, n_kv_heads=2, head_dim=32, n_documents=3, document_tokens=96
        ),
        other,
    )
    with (
        AllocationReader(tiny_chain.allocation) as plans,
        CaptureReader(other) as reader,
        pytest.raises(ArtifactError, match="of the model that was allocated"),
    ):
        require_same_model(plans, reader)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"budgets": ("6b",), "tiers": ("int8",)}, "--tier runs beside"),
        # Before anything is loaded: there is no such model.
        ({"budgets": ("6b",), "window": 8, "model": "none/such"}, "for codes and methods"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    tiny_chain: Any, tmp_path: Path, asked: dict[str, Any], message: str
) -> None:
    options = EvaluateOptions(**{"model": str(tiny_chain.model), **asked})
    with pytest.raises(UsageError, match=message):
        evaluate(options, tiny_chain.capture, None, tiny_chain.allocation, tmp_path / "d.json")
    assert not (tmp_path / "d.json").exists()


def test_methods_that_keep_tokens_in_bf16_need_a_dense_tier(
    tiny_chain: Any, tmp_path: Path
) -> None:
    without = tmp_path / "without.h5"
    tiers = ("polar-4222-fp16", "int8")
    allocate(
        AllocateOptions(
            budget="7b", tiers=tiers, page_size=16, horizon=40, window=32, utility="window"
        ),
        tiny_chain.capture,
        tiny_chain.codebooks,
        without,
    )
    options = EvaluateOptions(rows="published", max_documents=1, model=str(tiny_chain.model))
    result = evaluate(options, tiny_chain.capture, None, without, tmp_path / "e.json")
    names = {row.name for row in result.rows}
    assert {PLAN, POLICY} <= names and not any("bf16" in name for name in names)
    assert any("has no dense tier" in one for one in result.reading)
