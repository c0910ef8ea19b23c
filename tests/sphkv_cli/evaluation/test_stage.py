"""`evaluate` end to end: a tiny model captured, fitted, allocated and judged; and bad input."""

import json
import runpy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sphkv_cli.allocation.options import AllocateOptions
from sphkv_cli.allocation.stage import allocate
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.report import Report
from sphkv_cli.blocks import Line, Table
from sphkv_cli.capture.options import CaptureOptions, SyntheticOptions, TextSource
from sphkv_cli.capture.stage import capture
from sphkv_cli.capture.synthetic import capture_synthetic
from sphkv_cli.errors import ArtifactError, GateFailed, SphkvError, UsageError
from sphkv_cli.evaluation.options import EvaluateOptions
from sphkv_cli.evaluation.stage import evaluate, require_gates
from sphkv_cli.evaluation.view import view
from sphkv_cli.fit.key_means import layer_keys
from sphkv_cli.fit.options import FitOptions
from sphkv_cli.fit.rope_frequencies import rope_frequencies
from sphkv_cli.fit.stage import fit_codebooks
from tests.sphkv_cli.tiny_models import save_llama


@dataclass(frozen=True)
class Chain:
    """The artifacts of one tiny model."""

    model: Path
    capture: Path
    codebooks: Path
    allocation: Path


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    model = save_llama(folder / "tiny", seed=7)
    texts = []
    for name, word in (("one", "alpha"), ("two", "beta"), ("three", "gamma")):
        path = folder / f"{name}.txt"
        path.write_text(" ".join(f"{word} {i * i}" for i in range(60)))
        texts.append(path)
    made = Chain(model, folder / "capture.h5", folder / "codebooks.h5", folder / "allocation.h5")
    sources = zip(("fit", "select", "judge"), texts, strict=True)
    capture(
        CaptureOptions(
            model=str(model),
            texts=tuple(TextSource.parse(f"{split}={path}") for split, path in sources),
            document_tokens=150,
        ),
        made.capture,
    )
    codes = ("4/2/2/2:fp16", "5/3/3/3:r3")
    fit_codebooks(FitOptions(codes=codes), made.capture, made.codebooks)
    allocate(
        AllocateOptions(budget="6b", page_size=16, horizon=40, window=32),
        made.capture,
        made.codebooks,
        made.allocation,
    )
    return made


def options(chain: Chain, **others: Any) -> EvaluateOptions:
    return EvaluateOptions(model=str(chain.model), **others)


def test_uniform_report_holds_every_row(chain: Chain, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    asked = options(chain, methods=("kivi:4", "turboquant:3", "turboquant:3,centred"), seeds=2)
    result = evaluate(asked, chain.capture, chain.codebooks, None, output)
    rows = {row.name: row for row in result.rows}
    assert result.protocol == "uniform" and result.n_documents == len(rows["dense"].documents)
    # Two codes and TurboQuant twice, all with two rotations; KIVI and dense with none to vary.
    assert len(rows) == 2 + 2 + 1 + 1
    assert [row.n_seeds for row in rows.values()].count(2) == 4
    assert abs(rows["dense"].kl.mean) < 1e-6 and rows["dense"].top1.mean == 1
    ours = [row for row in result.rows if row.is_ours]
    assert len(ours) == 2
    small, large = ours[0], ours[-1]
    assert small.code_rate < large.code_rate < large.laid_out_rate
    assert large.kl.mean < small.kl.mean
    report = Report.open(output)
    assert report.header.digest == result.digest
    assert set(report.header.inputs) == {"capture", "codebooks"}
    stored = report.content["evaluation"]["rows"]
    assert [row["name"] for row in stored] == list(rows)
    assert stored[0]["kl"]["mean"] == rows[stored[0]["name"]].kl.mean
    assert str(tmp_path) not in output.read_text()
    blocks = view(result)
    tables = [block for block in blocks if isinstance(block, Table)]
    assert all(len(table.rows) == len(rows) for table in tables)
    assert any(isinstance(block, Line) and "KIVI-4" in block.text for block in blocks)


def test_retention_judges_plan_policy_and_uniform(chain: Chain, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    result = evaluate(options(chain), chain.capture, None, chain.allocation, output)
    rows = {row.name: row for row in result.rows}
    assert result.protocol == "retention"
    assert {"plan", "policy", "best uniform tier", "dense"} <= set(rows)
    assert abs(rows["dense"].kl.mean) < 1e-6
    assert rows["plan"].kl.mean > 0
    for name in ("plan", "policy", "best uniform tier"):
        for document in rows[name].documents:
            n_context = document.n_tokens - 40
            budget = 6 / 8 * n_context * 2 * 2 * 2 * 32
            assert document.coded_bytes <= budget
            assert document.n_scored == 40 - 1
    assert [row.name for row in result.rows if row.is_ours] == ["plan", "policy"]
    assert any("frozen policy" in sentence for sentence in result.reading)


def test_gates_fail_after_the_report_is_written(chain: Chain, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    asked = options(chain, methods=(), gate_kl=1e-9, gate_top1=0.01)
    result = evaluate(asked, chain.capture, chain.codebooks, None, output)
    assert [gate.holds for gate in result.gates] == [False, True] * 2
    assert json.loads(output.read_text())["content"]["evaluation"]["gates"]
    with pytest.raises(GateFailed, match="2 of 4 gates failed: KL of") as failed:
        require_gates(result)
    assert failed.value.exit_code == 3
    lenient = options(chain, methods=(), gate_kl=100.0, codes=(result.rows[0].name,))
    again = evaluate(lenient, chain.capture, chain.codebooks, None, output, force=True)
    require_gates(again)
    assert len(again.gates) == 1


def test_bad_input_is_refused(chain: Chain, tmp_path: Path) -> None:
    output = tmp_path / "report.json"

    def refused(kind: type[SphkvError], match: str, **changed: Any) -> None:
        inputs = {"capture": chain.capture, "codebooks": chain.codebooks, "allocation": None}
        inputs |= {key: changed.pop(key) for key in tuple(changed) if key in inputs}
        asked = options(chain, **({"methods": ()} | changed))
        with pytest.raises(kind, match=match):
            evaluate(asked, **inputs, output=output)
        assert not output.exists()

    refused(UsageError, "needs an allocation", protocol="retention")
    refused(UsageError, "has no tier 'nothing'", codes=("nothing",))
    refused(UsageError, "has no tier 'nothing'", allocation=chain.allocation, tiers=("nothing",))
    refused(UsageError, "centred methods need", methods=("eden:3,centred",), codebooks=None)
    refused(UsageError, "--window 31", methods=("kivi:2",), window=16)
    refused(SphkvError, "--first-scored", first_scored=149)
    refused(SphkvError, "none of which is read coded.*--window", window=1000)
    refused(ArtifactError, "does not exist", capture=tmp_path / "none.h5")
    other = save_llama(tmp_path / "other", seed=8)
    with pytest.raises(ArtifactError, match="digest"):
        evaluate(EvaluateOptions(model=str(other)), chain.capture, chain.codebooks, None, output)
    # The same weights under another RoPE, and without its last layer.
    for name, entry in (("rope", ("rope_theta", 5e5)), ("layers", ("num_hidden_layers", 1))):
        changed = shutil.copytree(chain.model, tmp_path / name)
        _change_config(changed / "config.json", *entry)
        for books, plans in ((chain.codebooks, None), (None, chain.allocation)):
            with pytest.raises(ArtifactError, match="digest"):
                evaluate(EvaluateOptions(model=str(changed)), chain.capture, books, plans, output)
            assert not output.exists()
    synthetic = tmp_path / "synthetic.h5"
    shape = SyntheticOptions(2, 4, 2, 32, document_tokens=128)
    capture_synthetic(shape, synthetic)
    refused(SphkvError, "synthetic", capture=synthetic)
    output.write_text("mine")
    with pytest.raises(ArtifactError, match="--force"):
        evaluate(options(chain), chain.capture, chain.codebooks, None, output)
    assert output.read_text() == "mine"


def _change_config(path: Path, entry: str, value: float) -> None:
    config = json.loads(path.read_text())
    if entry == "rope_theta":
        config["rope_parameters"] = {"rope_type": "default", entry: value}
    config[entry] = value
    path.write_text(json.dumps(config))


def test_the_quality_table_runs(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[3] / "examples" / "quality_uniform.py"
    arguments = [str(chain.capture), "--model", str(chain.model), "--seeds", "2"]
    monkeypatch.setattr("sys.argv", [str(script), *arguments, "--only", "full depth"])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "full depth 4/2/2/2/3, pre-RoPE mean removed" in printed
    assert "full depth 4/2/2/2/3, chosen frames" in printed
    assert "uniform: every query reads the coded past" in printed


def test_layer_keys_come_from_the_fit_documents(chain: Chain) -> None:
    with CaptureReader(chain.capture) as reader:
        inv_freq = rope_frequencies(reader)[1]
        statistics = layer_keys(reader, 1, inv_freq)
        fit = [reader.keys(document, 1) for document in reader.documents_of("fit")]
    together = np.concatenate(fit)
    norms = np.linalg.norm(together, axis=-1)
    assert np.allclose(statistics.post_rope, together.mean(axis=0), atol=1e-5)
    # torch's median is the lower of the two middle ones.
    ranks = (norms < statistics.median_norm - 1e-5).mean(axis=0)
    assert (abs(ranks - 0.5) < 0.01).all()
    # The mean before RoPE, by turning every key back with complex numbers.
    half = together.shape[-1] // 2
    turns = np.exp(-1j * np.concatenate([np.arange(len(keys)) for keys in fit])[:, None] * inv_freq)
    before = ((together[..., :half] + 1j * together[..., half:]) * turns[:, None]).mean(axis=0)
    assert statistics.pre_rope is not None
    expected = np.concatenate([before.real, before.imag], axis=-1)
    assert np.allclose(statistics.pre_rope, expected, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"protocol": "both"},
        {"methods": ("turboquant:9",)},
        {"split": "fit"},
        {"window": -1},
        {"seeds": 0},
        {"gate_kl": 0.0},
        {"gate_top1": float("nan")},
        {"max_documents": 0},
    ],
)
def test_options_that_cannot_be_meant(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        EvaluateOptions(**wrong)
