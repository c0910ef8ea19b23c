"""`evaluate --stepwise`: the drop-in cache gives what the parallel forward gives."""

from pathlib import Path
from typing import Any

import pytest

from sphkv_cli.errors import UsageError
from sphkv_cli.evaluation.options import EvaluateOptions
from sphkv_cli.evaluation.stage import evaluate


def test_step_by_step_has_the_kl_of_the_parallel_policy(tiny_chain: Any, tmp_path: Path) -> None:
    options = EvaluateOptions(model=str(tiny_chain.model), stepwise=True, tiers=("int8",))
    result = evaluate(
        options, tiny_chain.capture, None, tiny_chain.allocation, tmp_path / "report.json"
    )
    rows = {row.name: row for row in result.rows}
    stepped, parallel = rows["policy, step by step"], rows["policy"]
    assert result.rows[-1].name == "dense"
    assert stepped.kl.mean == pytest.approx(parallel.kl.mean, rel=0.02)
    assert stepped.top1.mean == pytest.approx(parallel.top1.mean, abs=0.05)
    assert parallel.kl.mean > 1e-3
    # Measured from the tensors: the pages that the plan counts, in larger page tables.
    assert 0.9 < stepped.coded_laid_out_rate / parallel.coded_laid_out_rate < 1.3


def test_codebooks_have_no_policy_to_step_through(tiny_chain: Any, tmp_path: Path) -> None:
    options = EvaluateOptions(model=str(tiny_chain.model), stepwise=True)
    with pytest.raises(UsageError, match="--stepwise"):
        evaluate(options, tiny_chain.capture, tiny_chain.codebooks, None, tmp_path / "report.json")
