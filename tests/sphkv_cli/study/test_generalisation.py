"""Calibrations on captures whose means are known to differ, and the whole study on a tiny model."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.capture.options import SyntheticOptions
from sphkv_cli.capture.synthetic import capture_synthetic
from sphkv_cli.errors import UsageError
from sphkv_cli.progress import NullProgress
from sphkv_cli.study import domain_capture, generalisation
from sphkv_cli.study.domain_capture import Captured, model_name
from sphkv_cli.study.generalisation import measure_curve, measure_transfer, run
from sphkv_cli.study.generalisation_report import LearningCurve, Transfer, excess, read
from sphkv_cli.study.inputs import StudyInputs, StudyOptions


@pytest.fixture
def worlds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Captured, Captured, Captured]]:
    """Three synthetic captures: each seed has mean keys of its own."""
    monkeypatch.setattr(generalisation, "N_SEEDS", 2)
    monkeypatch.setattr(generalisation, "FIT_TOKENS", 256)
    monkeypatch.setattr(generalisation, "CURVE_TOKENS", (16, 256))
    with ExitStack() as stack:
        found = []
        for seed in (1, 2, 3):
            path = tmp_path / f"{seed}.h5"
            options = SyntheticOptions(n_layers=1, head_dim=32, document_tokens=160, seed=seed)
            capture_synthetic(options, path)
            reader = stack.enter_context(CaptureReader(path))
            inputs = StudyInputs(StudyOptions(max_queries=32), reader)
            found.append(Captured(f"world {seed}", inputs))
        first, second, third = found
        yield first, second, third


def test_a_foreign_mean_is_worse_than_ones_own(worlds: tuple[Captured, ...]) -> None:
    transfer = measure_transfer(worlds, NullProgress())
    assert transfer.means.shape == transfer.books.shape == (2, 3, 3)
    for found in (excess(transfer.means), excess(transfer.books)):
        assert np.diag(found) == pytest.approx(1.0)
        assert (found[~np.eye(3, dtype=bool)] > 1.1).all()
    assert (transfer.uncentred_excess > 1.05).all()


def test_more_calibration_brings_the_error_to_that_of_the_judged_text(
    worlds: tuple[Captured, ...],
) -> None:
    curve = measure_curve(worlds[0], worlds[:2], NullProgress())
    few, many = curve.means["world 1"]
    assert many < few
    assert many == pytest.approx(1.0, abs=0.1)
    # What another world needs is not learned here, however much of this one is seen.
    assert curve.means["world 2"][1] > 1.1
    assert set(curve.books) == {"world 1", "world 2"}


def test_the_reading_names_the_worst() -> None:
    means = np.array([[[0.1, 0.3, 0.1], [0.2, 0.1, 0.4], [0.1, 0.1, 0.2]]] * 2)
    transfer = Transfer(("a", "b", "c"), np.array([[0.5, 0.1, 0.1]] * 2), means, 1.02 * means)
    curve = LearningCurve(
        (256, 512, 1024),
        {"a": np.array([1.3, 1.01, 1.0])},
        {"a": np.array([1.5, 1.2, 1.1])},
    )
    first, second = read(transfer, curve)
    assert "at most x3.00" in first and "(on b)" in first
    assert "no means at all up to x5.00 (on a)" in first
    assert "the worst pair is a for b (x3.00)" in first
    assert "by +2.0 to +2.0 %" in first and "an excess by 0.0 %" in first
    assert "512 tokens of calibration come within 2 % of what 1024 give" in second
    assert "from x1.500 at 256 tokens to x1.100" in second


def test_a_study_of_the_model_needs_its_name(worlds: tuple[Captured, ...]) -> None:
    for inputs in (StudyInputs(StudyOptions()), worlds[0].inputs):  # a synthetic capture has none
        with pytest.raises(UsageError, match="--model"):
            model_name(inputs)
    assert model_name(StudyInputs(StudyOptions(), model="smollm2")) == "smollm2"


def _tiny_model(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_the_study_runs_on_a_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(generalisation, "N_SEEDS", 2)
    monkeypatch.setattr(generalisation, "FIT_TOKENS", 128)
    monkeypatch.setattr(generalisation, "CURVE_TOKENS", (64, 128))
    for module in (generalisation, domain_capture):
        monkeypatch.setattr(module, "DOCUMENT_TOKENS", 128)
    model = _tiny_model(tmp_path / "tiny")
    result = run(StudyInputs(StudyOptions(max_documents=1, max_queries=8), model=str(model)))
    names = ("code", "one word", "one sentence", "random tokens")
    assert result.tables[0].columns == ("calibrated on", *names)
    assert [row[0] for row in result.tables[0].rows] == [*names, "no means", "output error, own"]
    assert "Without prose" in " ".join(result.conditions)
    assert [row[0] for row in result.tables[2].rows] == ["64", "128"]
