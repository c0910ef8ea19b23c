"""One table of everything that codes a context: plans, our codes and published ones; its figure."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sphkv_cli.blocks import Table
from sphkv_cli.errors import ArtifactError, UsageError
from sphkv_cli.evaluation.comparator_coding import ComparatorCoding
from sphkv_cli.evaluation.dense_ends import EndsKeptDense
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.options import EvaluateOptions
from sphkv_cli.evaluation.quantisers import ENDS_DENSE, OUR_CODES
from sphkv_cli.evaluation.rate_plot import rate_figure
from sphkv_cli.evaluation.result import EvaluationResult
from sphkv_cli.evaluation.stage import evaluate
from sphkv_cli.evaluation.view import view
from sphkv_cli.plots.draw import write_figure
from sphkv_codebooks.comparators.kivi import KiviKeys, KiviValues
from sphkv_codebooks.comparators.turboquant_mse import TurboQuantMse
from sphkv_codebooks.rotation import Rotation

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(autouse=True)
def _scripts_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("table") / "table.json"


@pytest.fixture(scope="module")
def table(tiny_chain: Any, report: Path) -> EvaluationResult:
    """Two budgets, a code of ours, and the usual methods, ends coded and dense."""
    options = EvaluateOptions(
        budgets=("3b", "6b"),
        rows="published",
        window=16,
        first_tokens=2,
        max_documents=1,
        model=str(tiny_chain.model),
    )
    return evaluate(
        options,
        tiny_chain.capture,
        tiny_chain.codebooks,
        tiny_chain.allocation,
        report,
    )


def test_plans_our_codes_and_published_methods_stand_in_one_protocol(
    table: EvaluationResult,
) -> None:
    families = {row.family for row in table.rows}
    asked = {"plan", "policy", "SnapKV, bf16", "KIVI", "TurboQuant-MSE", "PolarQuant", "fp8"}
    assert asked | {"integers per token", OUR_CODES, "dense"} <= families
    assert {OUR_CODES + ENDS_DENSE, "KIVI" + ENDS_DENSE} <= families
    assert table.protocol == "retention"
    scored = {row.documents[0].n_scored for row in table.rows}
    assert scored == {40 - 1}
    assert table.rows[-1].name == "dense" and table.rows[-1].kl.mean < 1e-6
    # Gates hold for plans; codes are what they are compared with, unless named.
    assert {row.family for row in table.rows if row.is_ours} == {"plan", "policy"}
    lines = {family: [r for r in table.rows if r.family == family] for family in families}
    assert [len(lines[family]) for family in ("policy", "KIVI", OUR_CODES)] == [2, 2, 2]


def test_bytes_of_a_context_are_those_of_all_that_is_kept(table: EvaluationResult) -> None:
    rows = {row.name: row for row in table.rows}
    n_context, heads, head_dim = 150 - 40, 2 * 2, 32
    fp8 = rows["fp8 e4m3, no scale"].documents[0].coded_bytes
    assert fp8 == n_context * heads * head_dim * 2
    ends = rows["fp8 e4m3, no scale, ends 2+16 dense"].documents[0].coded_bytes
    assert ends - fp8 == 18 * heads * head_dim * 2
    for budget, rate in (("3b", 3.0), ("6b", 6.0)):
        assert rows[f"policy, {budget}"].coded_laid_out_rate <= rate


def test_dense_ends_are_never_coded(
    judged: Callable[[str], JudgedModel], token_ids: torch.Tensor
) -> None:
    shape = judged("llama").shape
    inner = ComparatorCoding("KIVI-2", KiviKeys(2), KiviValues(2), shape)
    keys, values = torch.randn(2, 40, 2, 32, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(40)
    coded = EndsKeptDense(inner, shape, 3, 5).code(0, keys, values, positions)
    between = inner.code(0, keys[3:35], values[3:35], positions[3:35])
    assert torch.equal(coded.keys[3:35], between.keys)
    for ends in (slice(0, 3), slice(35, 40)):
        assert torch.equal(coded.keys[ends], keys[ends].bfloat16().float())
        assert torch.equal(coded.values[ends], values[ends].bfloat16().float())
    # A window as long as the text leaves nothing to code, and costs what dense costs.
    everything = EndsKeptDense(inner, shape, 3, 37)
    assert torch.equal(everything.code(0, keys, values, positions).keys, keys.bfloat16().float())
    assert everything.stored_bytes(40) == EndsKeptDense(inner, shape, 9, 99).stored_bytes(40)
    assert everything.stored_bytes(40) == shape.dense_bytes(40)
    with pytest.raises(UsageError, match="0 or more"):
        EndsKeptDense(inner, shape, -1, 0)


def test_rotations_of_a_method_with_dense_ends_share_a_row(
    judged: Callable[[str], JudgedModel],
) -> None:
    from sphkv_cli.evaluation.candidate import Candidate

    shape = judged("llama").shape
    rows = set()
    for seed in (1, 2):
        turbo = TurboQuantMse(3, 32, Rotation("haar", 32, seed))
        coding = ComparatorCoding(f"TurboQuant, seed {seed}", turbo, turbo, shape)
        rows.add(Candidate(EndsKeptDense(coding, shape, 4, 32), False).row)
    assert rows == {"TurboQuant, ends 4+32 dense"}


def test_a_figure_has_one_line_per_family(table: EvaluationResult, tmp_path: Path) -> None:
    figure = rate_figure(table)
    by_rate = {series.label: series for series in figure.panels[0].series}  # type: ignore[union-attr]
    assert set(by_rate) == {row.family for row in table.rows[:-1]}
    policy = by_rate["policy"]
    assert policy.emphasis and list(policy.x) == sorted(policy.x) and len(policy.x) == 2
    # The same code with its ends dense has its colour, dashed, and no second entry in the legend.
    ends = by_rate["KIVI" + ENDS_DENSE]
    assert ends.pair_of == "KIVI" and ends.style == "dashed-both"
    drift = {series.label: series for series in figure.panels[1].series}  # type: ignore[union-attr]
    # Near 3 bits: the policy at 3b, not the one at 6b; and no 8-bit method.
    chosen = next(row for row in table.rows if row.name == "policy, 3b")
    assert list(drift["policy"].y) == [position.kl for position in chosen.by_position]
    assert "fp8" not in drift
    write_figure(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_table_joins_quality_with_speed(
    table: EvaluationResult,
    report: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kernel = EXAMPLES / "results" / "kernel-h100.json"
    arguments = ["one_table.py", str(report), "--kernel", str(kernel), "--family", "PolarQuant"]
    monkeypatch.setattr("sys.argv", [*arguments, "--family", "KIVI", "--family", "dense"])
    runpy.run_path(str(EXAMPLES / "one_table.py"), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    cells = {line.split(" | ")[0]: line.rstrip(" |").split(" | ") for line in lines}
    assert len(cells) == 1 + 2 + 1
    recorded = next(
        case["speed_up"]
        for case in json.loads(kernel.read_text())["cases"]
        if case["tiers"] == ["4222-fp16"] and case["shape"]["n_tokens"] == 32768
        if case["shape"]["n_sequences"] == 8 and case["page_size"] == 32
    )
    polar = cells["| PolarQuant 4/2/2/2, fp16 radii, Haar"]
    row = next(row for row in table.rows if row.family == "PolarQuant")
    assert polar[1] == f"{row.coded_laid_out_rate:.2f}"
    assert polar[-1] == f"{recorded:.2f}x"
    assert cells["| KIVI-4"][-1] == "-" and cells["| dense"][-1] == "1.00x"


def test_a_profile_gives_plan_and_policy_of_its_budget_a_speed_and_no_other_row(
    report: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"batch": 1, "n_context": 512, "speedup": 9.0}, {"batch": 8, "n_context": 512}]
    rows[1]["speedup"] = 1.75
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"content": {"profile": {"speed": {"rows": rows}}}}))
    script = EXAMPLES / "one_table.py"
    monkeypatch.setattr("sys.argv", ["one_table.py", str(report), "--profile", f"3b={profile}"])
    runpy.run_path(str(script), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    speeds = {line.split(" | ")[0]: line.rstrip(" |").split(" | ")[-1] for line in lines}
    assert speeds.pop("| plan, 3b") == speeds.pop("| policy, 3b") == "1.75x"
    assert speeds.pop("| dense") == "1.00x"
    assert "| plan, 6b" in speeds and set(speeds.values()) == {"-"}
    kernel_tier = runpy.run_path(str(script))["kernel_tier"]
    assert kernel_tier("polar-4222-r2") == "4222-r2"
    assert kernel_tier("polar-4222-r2, sinks < 0.6 dense") is None
    assert kernel_tier("polar-5333-r3/polar-5333-r3-unbiased") == "5333-r3"
    assert kernel_tier("polar-4333-r3/polar-3222-r2") is None
    assert kernel_tier("polar-n17.5.6-e5m4/polar-4222-r2") is None


def test_positions_are_printed_when_asked_for(table: EvaluationResult) -> None:
    def titles(**asked: bool) -> list[str]:
        return [block.title for block in view(table, **asked) if isinstance(block, Table)]

    assert "KL by position" not in titles()
    assert "KL by position" in titles(by_position=True)


def test_methods_come_without_codebooks_where_published_rows_do(
    tiny_chain: Any, tmp_path: Path
) -> None:
    def families(**asked: Any) -> set[str]:
        options = EvaluateOptions(max_documents=1, model=str(tiny_chain.model), **asked)
        result = evaluate(
            options,
            tiny_chain.capture,
            None,
            tiny_chain.allocation,
            tmp_path / "r.json",
            force=True,
        )
        return {row.family for row in result.rows}

    assert "KIVI" not in families()
    assert "KIVI" in families(methods=("kivi:4",))
    assert {"KIVI", "PolarQuant"} <= families(rows="published")
    with pytest.raises(UsageError, match="needs codebooks"):
        families(codes=("polar",))


def test_a_context_shorter_than_every_window_is_judged_and_counted(
    tiny_chain: Any, tmp_path: Path
) -> None:
    """20 tokens: fewer than a group of KIVI, than the ends kept dense, than the scoring window."""
    options = EvaluateOptions(
        methods=("kivi:2", "turboquant:3"),
        budgets=("8b",),
        context=20,
        window=16,
        first_tokens=8,
        max_documents=1,
        model=str(tiny_chain.model),
    )
    result = evaluate(
        options, tiny_chain.capture, None, tiny_chain.allocation, tmp_path / "short.json"
    )
    rows = {row.name: row for row in result.rows}
    dense = rows["dense"].documents[0].coded_bytes
    assert dense == 20 * 2 * 2 * 32 * 2 * 2
    # An unfinished group of KIVI's keys lies dense; its values are coded.
    assert dense / 2 < rows["KIVI-2"].documents[0].coded_bytes < dense
    for name in ("KIVI-2", "TurboQuant-MSE 3 bit, Haar"):
        ends = rows[f"{name}, ends 8+16 dense"]
        assert ends.documents[0].coded_bytes == dense
        assert ends.kl.mean < rows[name].kl.mean
    assert all(row.documents[0].n_scored == 150 - 20 - 1 for row in result.rows)


def test_codebooks_of_another_model_are_refused(tiny_chain: Any, tmp_path: Path) -> None:
    from sphkv_cli.capture.options import SyntheticOptions
    from sphkv_cli.capture.synthetic import capture_synthetic
    from sphkv_cli.fit.options import FitOptions
    from sphkv_cli.fit.stage import fit_codebooks

    shape = SyntheticOptions(
        n_layers=2, n_q_heads=4, n_kv_heads=2, head_dim=32, n_documents=3, document_tokens=96
    )
    capture_synthetic(shape, tmp_path / "other.h5")
    fit_codebooks(
        FitOptions(codes=("4/2/2/2:fp16",), centring="none"),
        tmp_path / "other.h5",
        tmp_path / "books.h5",
    )
    with pytest.raises(ArtifactError, match="digest"):
        evaluate(
            EvaluateOptions(rows="published", model=str(tiny_chain.model)),
            tiny_chain.capture,
            tmp_path / "books.h5",
            tiny_chain.allocation,
            tmp_path / "r.json",
        )


def test_the_budget_table_sets_the_policy_beside_the_best_that_is_not_joint(
    table: EvaluationResult,
    report: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = EXAMPLES / "budget_table.py"
    monkeypatch.setattr("sys.argv", ["budget_table.py", str(report)])
    runpy.run_path(str(script), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| 3b", "| 6b"]
    rows = {row.name: row for row in table.rows}
    policy = rows["policy, 6b"]
    rivals = [
        row
        for name, row in rows.items()
        if not name.startswith(("policy", "plan", "oracle", "joint"))
        and row.coded_laid_out_rate <= 6.0
    ]
    best = min(rivals, key=lambda row: row.kl_geometric.mean)
    ratio = best.kl_geometric.mean / policy.kl_geometric.mean
    assert lines[1].endswith(f"({best.name.removesuffix(', 6b')}): {ratio:.0f}x |")


def test_a_recorded_report_is_drawn_as_the_command_draws_it(
    table: EvaluationResult, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "KIVI" in {row.family for row in table.rows}
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    script = EXAMPLES / "draw_evaluation.py"
    for name, others in (("all.png", []), ("few.png", ["--leave-out", "KIVI"])):
        monkeypatch.setattr("sys.argv", ["draw", str(report), str(tmp_path / name), *others])
        runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "all.png").read_bytes() != (tmp_path / "few.png").read_bytes()
    monkeypatch.setattr("sys.argv", ["draw", str(report), "x.png", "--leave-out", "nothing"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
