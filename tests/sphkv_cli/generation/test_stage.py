"""`sphkv generate` end to end on a tiny model, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sphkv_cli.app import app
from sphkv_cli.errors import SphkvError, UsageError
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


def test_what_cannot_be_generated_is_refused(tiny_chain: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no prompt"):
        GenerateOptions()
    with pytest.raises(UsageError, match="new-tokens is 0"):
        GenerateOptions(prompts=("a",), new_tokens=0)
    for sources in ((None, None), (tiny_chain.allocation, tiny_chain.codebooks)):
        with pytest.raises(UsageError, match="one of --allocation"):
            generate(options(tiny_chain), *sources)
    with pytest.raises(UsageError, match="needs --tier"):
        generate(options(tiny_chain), None, tiny_chain.codebooks)
    missing = GenerateOptions(prompt_files=(tmp_path / "none.txt",), model=str(tiny_chain.model))
    with pytest.raises(SphkvError, match="cannot be read"):
        generate(missing, tiny_chain.allocation, None)
    long = GenerateOptions(prompts=("a " * 300,), model=str(tiny_chain.model))
    with pytest.raises(SphkvError, match="context of 512"):
        generate(long, tiny_chain.allocation, None)
