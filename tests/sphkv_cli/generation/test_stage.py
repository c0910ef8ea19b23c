"""`sphkv generate` end to end on a tiny model, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sphkv_cli.app import app
from sphkv_cli.blocks import bytes_text
from sphkv_cli.errors import ArtifactError, SphkvError, UsageError
from sphkv_cli.generation.options import GenerateOptions
from sphkv_cli.generation.stage import generate
from sphkv_cli.generation.view import view

TEXT = " ".join(f"gamma {i * i}" for i in range(25))


def options(chain: Any, **others: Any) -> GenerateOptions:
    return GenerateOptions(
        prompts=(TEXT, TEXT[40:]), model=str(chain.model), new_tokens=20, **others
    )


def test_a_dense_tier_generates_what_the_dense_cache_does(tiny_chain: Any) -> None:
    result = generate(options(tiny_chain, tier="dense", window=500), None, tiny_chain.codebooks)
    assert len(result.continuations) == 2 and result.backend == "reference"
    for found in result.continuations:
        assert found.first_difference is None and found.dense_text == found.coded_text
        assert found.probability_dense is None and found.n_generated == 20


def test_a_policy_generates_from_fewer_bytes_and_says_where_it_parts(tiny_chain: Any) -> None:
    result = generate(options(tiny_chain), tiny_chain.allocation, None)
    for found in result.continuations:
        first = found.first_difference
        if first is None:
            continue
        assert found.probability_dense is not None and found.probability_coded is not None
        # Greedy: the dense run took its likeliest token.
        assert 1 >= found.probability_dense >= found.probability_coded > 0
        assert found.dense_text != found.coded_text
    # A random model is not robust: 4 bits and dropped tokens change it somewhere.
    assert any(found.first_difference is not None for found in result.continuations)
    assert view(result)


def test_the_command_prints_both(tiny_chain: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT)
    arguments = ["generate", "--allocation", str(tiny_chain.allocation), "--new-tokens", "3"]
    arguments += ["--model", str(tiny_chain.model), "--prompt-file", str(path)]
    found = CliRunner().invoke(app, [*arguments, "--prompt-tokens", "80", "--json"])
    assert found.exit_code == 0, found.output
    continuation = json.loads(found.stdout)["continuations"][0]
    assert continuation["n_prompt"] == 80 and continuation["n_generated"] == 3
    shown = CliRunner().invoke(app, [*arguments, "--prompt-tokens", "80"])
    assert "float64 reference" in shown.stdout and "prompt.txt, coded:" in shown.stdout


def test_frames_are_told_from_tokens_and_a_budget_says_what_it_counts(tiny_chain: Any) -> None:
    short, long = (
        generate(
            GenerateOptions(
                prompts=(TEXT,),
                prompt_tokens=n,
                new_tokens=2,
                model=str(tiny_chain.model),
                budget=budget,
            ),
            tiny_chain.allocation,
            None,
        )
        for n, budget in ((5, None), (100, "3b"))
    )
    # The same at any length, and more than the tokens of a short context.
    assert short.frame_bytes == long.frame_bytes
    first, second = short.continuations[0], long.continuations[0]
    assert first.coded_token_bytes < short.frame_bytes
    assert 0 < first.coded_token_bytes < second.coded_token_bytes
    for result, found in ((short, first), (long, second)):
        assert found.coded_bytes == found.coded_token_bytes + result.frame_bytes
        said = repr(view(result))
        for n_bytes in (found.coded_token_bytes, found.coded_bytes, result.frame_bytes):
            assert bytes_text(n_bytes) in said
    assert (short.budget, long.budget) == (None, "3b")
    assert first.n_coded == 0 < second.n_coded
    assert "too short to be coded" in repr(view(short))
    assert "are the same to the last token" not in repr(view(short))
    assert "1 continuations are the same to the last token" in repr(view(long))
    assert "The budget 3b counts sealed tokens" in repr(view(long))
    assert "The budget" not in repr(view(short))


def test_a_budget_that_codes_nothing_is_refused(tiny_chain: Any) -> None:
    def run(budget: str) -> None:
        generate(options(tiny_chain, budget=budget), tiny_chain.allocation, None)

    with pytest.raises(UsageError, match=r"codes nothing before [\d,]+ tokens.*prompt 1 and"):
        run("0.01b")
    with pytest.raises(UsageError, match=r"51 bytes leaves nothing beside .*give a larger one$"):
        run("0.05KiB")


def test_what_was_made_from_a_synthetic_capture_has_no_model(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sphkv_cli.generation.stage._model_name", lambda *_: "synthetic")
    with pytest.raises(SphkvError, match="no model to run"):
        generate(GenerateOptions(prompts=(TEXT,)), tiny_chain.allocation, None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--allocation", "A", "--codebooks", "C"), "pass only one of them"),
        (("--allocation", "A", "--tier", "int8"), "--tier has no meaning with --allocation"),
        (("--codebooks", "C"), "--codebooks needs --tier"),
        (
            ("--codebooks", "C", "--tier", "int8", "--budget", "2b"),
            "--budget has no meaning with --codebooks",
        ),
        (("--allocation", "A", "--prompt", ""), "--prompt is empty"),
        (("--allocation", "A", "--budget", "2"), "budget '2' has no unit"),
        (("--allocation", "A", "--window", "-1"), "--window is -1; give 0 or more"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_file_or_model_is_opened(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr("sphkv_cli.generation.stage._model_name", lambda *_: 1 / 0)
    found = CliRunner().invoke(app, ["generate", "--prompt", "a text", *arguments])
    assert found.exit_code == 2, found.output
    assert said in found.stderr and found.stderr.count("\n") == 1


def test_a_wrong_artifact_is_refused_before_the_model_is_loaded(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sphkv_cli.models.load.load_model", lambda *_: 1 / 0)
    with pytest.raises(ArtifactError, match="holds codebooks, not allocation"):
        generate(options(tiny_chain), tiny_chain.codebooks, None)


def test_what_cannot_be_generated_is_refused(tiny_chain: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no prompt"):
        GenerateOptions()
    with pytest.raises(UsageError, match="new-tokens is 0"):
        GenerateOptions(prompts=("a",), new_tokens=0)
    with pytest.raises(UsageError, match="pass --allocation or --codebooks"):
        generate(options(tiny_chain), None, None)
    missing = GenerateOptions(prompt_files=(tmp_path / "none.txt",), model=str(tiny_chain.model))
    with pytest.raises(SphkvError, match=r"none\.txt does not exist; check the path$"):
        generate(missing, tiny_chain.allocation, None)
    (tmp_path / "empty.txt").touch()
    empty = GenerateOptions(prompt_files=(tmp_path / "empty.txt",), model=str(tiny_chain.model))
    with pytest.raises(SphkvError, match=r"empty\.txt holds no text; name a file with text"):
        generate(empty, tiny_chain.allocation, None)
    long = GenerateOptions(prompts=("a " * 300,), model=str(tiny_chain.model))
    with pytest.raises(SphkvError, match="context of 512"):
        generate(long, tiny_chain.allocation, None)
