"""The drop-in cache with an allocation's policy, from its file: placement, reading, refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from sphkv_cli.artifacts.allocation import AllocationReader
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.errors import ArtifactError, UsageError
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.plan_coding import PlanCoding
from sphkv_cli.evaluation.policy_coding import policy_coding
from sphkv_cli.evaluation.protocol import RetentionProtocol
from sphkv_cli.generation.context_policy import ContextPolicy
from sphkv_cli.generation.matching import require_layers, require_rope
from sphkv_cli.generation.spherical_cache import SphericalCache


@pytest.fixture(scope="module")
def load(tiny_chain: Any) -> Callable[[], Any]:
    """The captured model, loaded anew."""
    from transformers import AutoModelForCausalLM

    return lambda: AutoModelForCausalLM.from_pretrained(tiny_chain.model).eval()


def judged_document(tiny_chain: Any) -> tuple[Any, torch.Tensor, np.ndarray]:
    with AllocationReader(tiny_chain.allocation) as plans, CaptureReader(tiny_chain.capture) as cap:
        info = plans.documents[0]
        document = next(d for d in cap.documents if d.index == info.index)
        return info, torch.from_numpy(cap.token_ids(document)), plans.policy_tier_of_token(info)


def test_a_captured_context_is_placed_as_the_allocation_placed_it(
    tiny_chain: Any, load: Callable[[], Any]
) -> None:
    info, ids, expected = judged_document(tiny_chain)
    with AllocationReader(tiny_chain.allocation) as plans:
        policy = ContextPolicy.of(plans, 512)
    assert policy.laid_out_bytes(info.n_context) == info.policy_bytes
    coding = policy_coding(JudgedModel.of(load()), policy, ids[: info.n_context])
    assert (expected >= 0).any() and len(np.unique(expected)) > 2
    # Scores of a few tokens are equal to rounding and may change places.
    assert (coding.tier_of_token == expected).mean() > 0.99
    assert coding.laid_out_bytes == info.policy_bytes


def test_steps_after_a_prompt_equal_the_retention_protocol(
    tiny_chain: Any, load: Callable[[], Any]
) -> None:
    info, ids, _ = judged_document(tiny_chain)
    model = load().double()
    judged = JudgedModel.of(model)
    with AllocationReader(tiny_chain.allocation) as plans:
        coding = policy_coding(judged, ContextPolicy.of(plans, 512), ids[: info.n_context])
    assert isinstance(coding, PlanCoding)
    hidden, _ = judged.coded_hidden(ids, coding, RetentionProtocol(info.n_context))
    expected = judged.head(hidden)
    cache = SphericalCache.from_policy(tiny_chain.allocation, model, window=None)
    with torch.inference_mode():
        rows = [model(ids[None, : info.n_context], past_key_values=cache).logits[0]]
        for position in range(info.n_context, len(ids)):
            step = ids[None, position : position + 1]
            rows.append(model(step, past_key_values=cache).logits[0])
    found = torch.cat(rows)
    assert (found - expected).abs().max() < 1e-4
    assert (expected - judged.head(judged.dense_hidden(ids))).abs().max() > 0.01
    state = cache.states()[0]
    assert state is not None and state.n_tail == (len(ids) - info.n_context,)


def test_later_pages_keep_the_budget(tiny_chain: Any, load: Callable[[], Any]) -> None:
    _, ids, _ = judged_document(tiny_chain)
    model = load()
    cache = SphericalCache.from_policy(tiny_chain.allocation, model, window=8)
    model.generate(ids[None, :64], past_key_values=cache, max_new_tokens=60, do_sample=False)
    rule = cache.rule
    for state in cache.states():
        assert state is not None and state.pages is not None
        # Pages of 16: 64 of the prompt, then whatever fills one beyond 8 of 59 tokens.
        assert state.n_sealed == (64 + 3 * 16,) and state.n_tail == (59 - 3 * 16,)
        later = [t for t in state.pages.page_table.tiers.tolist() if t == rule.later_tier]  # type: ignore[attr-defined]
        assert len(later) >= 2 * 3
    tier = rule.tiers[rule.later_tier]  # type: ignore[attr-defined]
    bits = 8 * cache.states()[0].pages.tier_page_bytes()[rule.later_tier] / (2 * 32 * 16)  # type: ignore[union-attr, attr-defined]
    assert 2 < bits <= 4 and tier.kind == "spherical"


def test_a_short_prompt_stays_dense(tiny_chain: Any, load: Callable[[], Any]) -> None:
    model = load()
    cache = SphericalCache.from_policy(tiny_chain.allocation, model, window=None)
    with torch.inference_mode():
        model(torch.arange(5)[None], past_key_values=cache)
    state = cache.states()[0]
    assert state is not None and state.n_tail == (5,) and state.pages is None


def test_another_models_artifacts_are_refused(
    tiny_chain: Any, load: Callable[[], Any], tmp_path: Path
) -> None:
    model = load()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    for make in (
        lambda: SphericalCache.from_policy(tiny_chain.allocation, model),
        lambda: SphericalCache.uniform(tiny_chain.codebooks, "int8", model),
    ):
        with pytest.raises(ArtifactError, match="model digest"):
            make()
    model = load()
    model.model.rotary_emb.inv_freq.mul_(0.5)
    with pytest.raises(ArtifactError, match="another RoPE"):
        SphericalCache.from_policy(tiny_chain.allocation, model)
    with pytest.raises(UsageError, match="no tier 'paper'"):
        SphericalCache.uniform(tiny_chain.codebooks, "paper", load())
    with pytest.raises(UsageError, match="window is -1"):
        SphericalCache.from_policy(tiny_chain.allocation, load(), window=-1)
    with pytest.raises(ArtifactError, match="does not exist"):
        SphericalCache.from_policy(tmp_path / "none.h5", load())
    changed = tmp_path / "allocation.h5"
    changed.write_bytes(tiny_chain.allocation.read_bytes())
    with h5py.File(changed, "r+") as file:
        quotas = file["policy/quotas"]
        quotas[...] = np.roll(quotas[...], 1, axis=-1)
    with pytest.raises(ArtifactError, match="changed"):
        SphericalCache.from_policy(changed, load())


def test_layers_and_rope_are_compared_one_by_one(tiny_chain: Any, load: Callable[[], Any]) -> None:
    from dataclasses import replace

    judged = JudgedModel.of(load())
    with AllocationReader(tiny_chain.allocation) as plans:
        layers, rope = plans.layers, plans.info.rope
    path = tiny_chain.allocation
    require_layers(path, layers, judged.geometry)
    require_rope(path, rope, judged.model)
    for change in ({"window": 8}, {"softmax_scale": 1.0}, {"logit_softcap": 30.0}):
        other = (layers[0], replace(layers[1], **change))
        with pytest.raises(ArtifactError, match=f"{next(iter(change))}.*in layer 1"):
            require_layers(path, other, judged.geometry)


def test_a_uniform_tier_comes_from_its_codebooks(tiny_chain: Any, load: Callable[[], Any]) -> None:
    _, ids, _ = judged_document(tiny_chain)
    model = load()
    dense = model.generate(ids[None, :100], max_new_tokens=12, do_sample=False)
    cache = SphericalCache.uniform(tiny_chain.codebooks, "int8", model, window=8, page_size=16)
    coded = model.generate(ids[None, :100], past_key_values=cache, max_new_tokens=12)
    assert torch.equal(dense[:, :104], coded[:, :104])
    assert cache.memory_bytes() - cache.frame_bytes < 0.75 * cache.dense_bytes(4)
