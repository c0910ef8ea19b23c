"""The lm-evaluation-harness adapter on a task of this file: nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sphkv_cli.errors import SphkvError

pytest.importorskip("lm_eval", reason="lm-evaluation-harness (extra `harness`) is not installed")


@pytest.fixture(scope="module")
def loaded(tiny_chain: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_chain.model).eval()
    return model, AutoTokenizer.from_pretrained(tiny_chain.model)


def task(folder: Path, kind: str) -> dict[str, Any]:
    path = folder / "questions.jsonl"
    lines = [{"q": f"gamma {i} gamma {i + 1} gamma", "a": str(i % 2)} for i in range(5)]
    path.write_text("\n".join(map(json.dumps, lines)))
    shared = {
        "task": f"local_{kind}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": kind,
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
    }
    if kind == "generate_until":
        until = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
        return shared | {"generation_kwargs": until, "metric_list": [{"metric": "exact_match"}]}
    return shared | {"doc_to_choice": ["0", "1"], "metric_list": [{"metric": "acc"}]}


@pytest.mark.parametrize("kind", ["generate_until", "multiple_choice"])
def test_both_caches_answer_the_same_task(
    tiny_chain: Any, loaded: tuple[Any, Any], tmp_path: Path, kind: str
) -> None:
    from lm_eval.api.task import ConfigurableTask

    from sphkv_cli.generation.harness import evaluate_tasks
    from sphkv_cli.generation.spherical_cache import SphericalCache

    made = []

    def make() -> Any:
        made.append(SphericalCache.from_policy(tiny_chain.allocation, loaded[0]))
        return made[-1]

    asked = ConfigurableTask(config=task(tmp_path, kind))
    found = evaluate_tasks(*loaded, [asked], make, n_examples=0)
    assert found.keys() == {"dense", "coded"}
    # One cache per request, and each was read: the question lies in it.
    assert len(made) == (5 if kind == "generate_until" else 10)
    assert all(cache.get_seq_length() >= len("gamma 0 gamma 1 gamma") for cache in made)
    metric = "exact_match,none" if kind == "generate_until" else "acc,none"
    assert all(0 <= found[name][f"local_{kind}"][metric] <= 1 for name in found)


def test_likelihoods_from_a_dense_cache_are_those_of_one_forward_pass(
    loaded: tuple[Any, Any],
) -> None:
    from transformers import DynamicCache

    from sphkv_cli.generation.harness import CachedModel

    model, tokenizer = loaded
    harness = CachedModel(model, tokenizer, lambda: DynamicCache(config=model.config))
    context, continuation = tokenizer.encode("gamma 4 gamma"), tokenizer.encode(" 16 gamma")
    ids = torch.tensor([context + continuation])
    with torch.inference_mode():
        logits = torch.log_softmax(model(ids).logits[0].double(), dim=-1)
    rows = logits[len(context) - 1 : -1]
    expected = float(rows.gather(1, torch.tensor(continuation)[:, None]).sum())
    ((found, greedy),) = harness._loglikelihood_tokens([(None, context, continuation)])
    assert found == pytest.approx(expected, rel=1e-5) and greedy is False
    likeliest = [int(rows[0].argmax())]
    ((_, greedy),) = harness._loglikelihood_tokens([(None, context, likeliest)])
    assert greedy is True


def test_what_a_cache_cannot_answer_is_refused(loaded: tuple[Any, Any]) -> None:
    from types import SimpleNamespace

    from sphkv_cli.generation.harness import CachedModel

    harness = CachedModel(*loaded, lambda: None)
    with pytest.raises(SphkvError, match="rolling"):
        harness.loglikelihood_rolling([])
    with pytest.raises(SphkvError, match="only greedy"):
        harness.generate_until([SimpleNamespace(args=("a", {"do_sample": True}))])
    with pytest.raises(SphkvError, match="context is 512"):
        harness.generate_until([SimpleNamespace(args=("a" * 600, {"until": []}))])
