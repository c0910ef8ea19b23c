"""`evaluate --probe` end to end on a tiny model: reports, gates, and bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sphkv_cli.app import app
from sphkv_cli.artifacts.report import Report
from sphkv_cli.errors import SphkvError, UsageError
from sphkv_cli.evaluation.options import EvaluateOptions
from sphkv_cli.evaluation.probe_options import ProbeOptions
from sphkv_cli.evaluation.probe_stage import probe


def run(chain: Any, output: Path, asked: ProbeOptions, uniform: bool, **others: Any) -> Any:
    options = EvaluateOptions(model=str(chain.model), **others)
    sources = (chain.codebooks, None) if uniform else (None, chain.allocation)
    return probe(options, asked, chain.capture, *sources, output)


def test_copy_back_reports_policy_tiers_and_dense(tiny_chain: Any, tmp_path: Path) -> None:
    asked = ProbeOptions("copy-back", lengths=(150, 200), keys=2, prompts=2, gate=0.5)
    output = tmp_path / "probe.json"
    result = run(tiny_chain, output, asked, uniform=False, tiers=("best", "int8"))
    names = [row.name for row in result.rows]
    # No single tier fits 4 bits at 150 tokens with the tables; the row of one asked for is there.
    assert names == ["policy", "uniform int8", "uniform int8 + sink page", "dense"]
    assert result.n_prompts == 4 and result.n_codes == 8 and result.n_digits == 56
    assert 3 < result.rows[0].score.laid_out_rate <= 4 and result.rows[-1].is_ours is False
    # A random model answers nothing: the probe says so, and no gate holds.
    assert not result.is_usable and "proves nothing" in result.reading[0]
    assert [gate.holds for gate in result.gates] == [False]
    stored = Report.open(output).content["probe"]
    assert stored["rows"][0]["score"]["digit_accuracy"]["mean"] == pytest.approx(
        result.rows[0].score.digit_accuracy.mean
    )


def test_a_needle_reports_a_grid_for_each_code(tiny_chain: Any, tmp_path: Path) -> None:
    asked = ProbeOptions("needle", lengths=(100, 140), depths=(0.0, 1.0), prompts=1)
    result = run(
        tiny_chain, tmp_path / "probe.json", asked, uniform=True, methods=("turboquant:3",)
    )
    assert len(result.rows) == 4
    for row in result.rows:
        assert row.grid.lengths == (100, 140) and len(row.grid.digit_accuracy) == 2
        assert row.grid.coding == row.name


def test_the_command_prints_and_its_gate_exits_3(tiny_chain: Any, tmp_path: Path) -> None:
    output = tmp_path / "probe.json"
    arguments = ["evaluate", str(tiny_chain.capture), "--allocation", str(tiny_chain.allocation)]
    arguments += ["--model", str(tiny_chain.model), "--output", str(output), "--json"]
    arguments += ["--probe", "copy-back", "--probe-length", "150", "--probe-keys", "2"]
    found = CliRunner().invoke(app, [*arguments, "--probe-prompts", "1"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["kind"] == "copy-back"
    inspected = CliRunner().invoke(app, ["inspect", str(output)]).output
    for said in ("laid out rate", "digit accuracy", "policy", "dense", "proves nothing"):
        assert said in inspected
    gated = [*arguments, "--probe-prompts", "1", "--gate-recall", "0.9", "--force"]
    assert CliRunner().invoke(app, gated).exit_code == 3


def test_what_cannot_be_asked_is_refused(tiny_chain: Any, tmp_path: Path) -> None:
    for others, message in (
        ({"keys": 0}, "probe-keys"),
        ({"lengths": (9, 0)}, "--probe-length is 0; give 1 or more"),
        ({"depths": (0.5, 1.5)}, "--probe-depth is 1.5; give a fraction from 0 to 1"),
        ({"depths": (float("nan"),)}, "--probe-depth is nan"),
        ({"gate": 2.0}, "gate-recall"),
    ):
        with pytest.raises(UsageError, match=message):
            ProbeOptions("needle", **others)  # type: ignore[arg-type]
    output = tmp_path / "probe.json"
    with pytest.raises(SphkvError, match=r"^the probe's '600 tokens, .*--probe-length"):
        run(tiny_chain, output, ProbeOptions("needle", lengths=(600,)), uniform=True)
    with pytest.raises(UsageError, match="leave out --codebooks and --method"):
        asked = ProbeOptions("copy-back", lengths=(150,), keys=1)
        run(tiny_chain, output, asked, uniform=False, methods=("int8",))
    with pytest.raises(UsageError, match="no tier 'paper'"):
        asked = ProbeOptions("copy-back", lengths=(150,), keys=1)
        run(tiny_chain, output, asked, uniform=False, tiers=("paper",))
    assert not output.exists()


def test_a_context_too_short_for_its_statements_is_refused_before_the_model_is_loaded(
    tiny_chain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("sphkv_cli.models.load.load_model", loaded)
    said = r"a context of 5 tokens is too short for what it states, \d+ tokens; give a longer"
    with pytest.raises(UsageError, match=said):
        asked = ProbeOptions("needle", lengths=(5,))
        run(tiny_chain, tmp_path / "probe.json", asked, uniform=True)


def test_a_needles_colours_mean_the_same_in_every_picture(tiny_chain: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    from sphkv_cli.evaluation.probe_plot import grid_figure
    from sphkv_cli.plots.draw import write_figure

    asked = ProbeOptions("needle", lengths=(100,), depths=(0.0, 1.0), prompts=1)
    result = run(tiny_chain, tmp_path / "probe.json", asked, uniform=True, methods=("int8",))
    for panel in grid_figure(result).panels:
        assert panel.limits == (0, 1) and panel.row_names == ("100",)  # type: ignore[union-attr]
        assert panel.column_names == ("0", "1")  # type: ignore[union-attr]
    write_figure(grid_figure(result), tmp_path / "needle.svg")
    assert (tmp_path / "needle.svg").read_text().lstrip().startswith("<?xml")
