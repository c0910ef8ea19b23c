"""The drop-in cache against the masked parallel forward of `evaluate` and transformers' own cache.

float64 models throughout: what differs beyond 1e-4 is not rounding (codes are decided and frames
applied in float32, on vectors of a few units).
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from sphkv_cli.errors import EnvironmentUnable, SphkvError, UsageError
from sphkv_cli.evaluation.frame_coding import FrameCoding
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.protocol import ReadProtocol
from sphkv_cli.generation.placement import UniformRule
from sphkv_cli.generation.spherical_cache import SphericalCache
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.build import KernelBuildError
from sphkv_kernels.launch import KernelLaunchError
from sphkv_kernels.tier import PageError, TierFormat

HEAD_DIM, PAGE = 32, 16
ROUNDING = 1e-4

Model = Callable[[str], Any]
Frames = Callable[[str], FrameSet]


def code_4222() -> SphericalCode:
    return SphericalCode.analytic("paper", HEAD_DIM, (4, 2, 2, 2), "fp16")


@dataclass(frozen=True)
class AsTheCacheSeals(ReadProtocol):
    """Queries after the prompt read coded what the rule has sealed before they came."""

    rule: UniformRule
    n_prompt: int

    def reads_coded(self, queries: Tensor, tokens: Tensor) -> Tensor:
        sealed = torch.tensor([self.rule.n_sealed(int(i)) for i in queries])
        after = queries >= self.n_prompt
        return after[:, None] & (tokens[None] < sealed[:, None])

    def coded_positions(self, n_tokens: int) -> range:
        return range(self.rule.n_sealed(n_tokens))

    def coded_span(self, n_tokens: int, token_group: int) -> int:
        return n_tokens

    def scored(self, n_tokens: int) -> range:
        return range(self.n_prompt, n_tokens - 1)

    def check_group(self, name: str, token_group: int) -> None:
        return

    @property
    def description(self) -> str:
        return "as the cache seals"


def rule_of(frames: FrameSet, tier: TierFormat, window: int = 8) -> UniformRule:
    return UniformRule.of(tier, frames, page_size=PAGE, window=window, first_tokens=0)


def run(model: Any, ids: Tensor, cache: Any, portions: list[int]) -> Tensor:
    """Logits of all tokens, read in portions."""
    rows, start = [], 0
    with torch.inference_mode():
        for n in portions:
            step = ids[None, start : start + n]
            rows.append(model(input_ids=step, past_key_values=cache).logits[0])
            start += n
    return torch.cat(rows)


def steps(n_prompt: int, ids: Tensor) -> list[int]:
    return [n_prompt] + [1] * (len(ids) - n_prompt)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"])
def test_a_window_over_everything_is_transformers_own_cache(
    random_model: Model, frames: Frames, token_ids: Tensor, family: str
) -> None:
    model = random_model(family)
    portions = [40, 1, 1, 20, *[1] * 39]
    expected = run(model, token_ids, DynamicCache(config=model.config), portions)
    rule = rule_of(frames("none"), TierFormat.dense(), window=1000)
    cache = SphericalCache(model, rule)
    # transformers takes the softmax of soft-capped logits in float32.
    rounding = 1e-5 if family == "gemma2" else 1e-9
    assert (run(model, token_ids, cache, portions) - expected).abs().max() < rounding


@pytest.mark.parametrize(
    "family, centring, tier",
    [
        ("llama", "post_rope", "code"),
        ("qwen2", "pre_rope", "code"),
        ("qwen3", "none", "dense"),
        ("mistral", "post_rope", "code"),
        ("gemma2", "none", "code"),
        ("gemma3", "post_rope", "int8"),
    ],
)
def test_steps_equal_the_masked_parallel_forward(
    random_model: Model,
    frames: Frames,
    token_ids: Tensor,
    family: str,
    centring: str,
    tier: str,
) -> None:
    chosen = {
        "code": TierFormat.spherical(code_4222()),
        "dense": TierFormat.dense(),
        "int8": TierFormat.int8(),
    }[tier]
    model = random_model(family)
    # A window of 1 after pages of 16 in a sliding window of 24: sealing meets a page half in sight.
    rule = rule_of(frames(centring), chosen, window=1 if family == "gemma3" else 8)
    judged = JudgedModel.of(model)
    dense = judged.head(judged.dense_hidden(token_ids))
    coding = FrameCoding(chosen, rule.frames, judged.shape)
    for n_prompt in (1, 45) if family == "gemma3" else (60,):
        protocol = AsTheCacheSeals(rule, n_prompt)
        hidden, _ = judged.coded_hidden(token_ids, coding, protocol)
        expected = judged.head(hidden)
        cache = SphericalCache(model, rule)
        found = run(model, token_ids, cache, steps(n_prompt, token_ids))
        assert (found - expected).abs().max() < ROUNDING
        assert (expected - dense).abs().max() > 10 * ROUNDING


@pytest.mark.parametrize("family, centring", [("llama", "pre_rope"), ("gemma3", "post_rope")])
def test_a_second_portion_reads_the_codes_as_single_steps_do(
    random_model: Model, frames: Frames, token_ids: Tensor, family: str, centring: str
) -> None:
    model = random_model(family)
    # Nothing is sealed between 60 and 75 tokens, so both ways read the same pages.
    rule = rule_of(frames(centring), TierFormat.spherical(code_4222()), window=10)
    ids = token_ids[:73]
    assert rule.n_sealed(60) == rule.n_sealed(73) == 48
    at_once = run(model, ids, SphericalCache(model, rule), [60, 13])
    one_by_one = run(model, ids, SphericalCache(model, rule), steps(60, ids))
    assert (at_once - one_by_one).abs().max() < 1e-9


def test_left_padded_batches_equal_singles(
    random_model: Model, frames: Frames, token_ids: Tensor
) -> None:
    for family in ("llama", "gemma3"):
        model = random_model(family)
        rule = rule_of(frames("post_rope"), TierFormat.spherical(code_4222()))
        lengths, n_steps = (3, 30, 61), 12
        rows = [token_ids[:n] for n in lengths]
        width = max(lengths)
        batch = torch.stack([torch.nn.functional.pad(r, (width - len(r), 0)) for r in rows])
        mask = torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])
        cache = SphericalCache(model, rule)
        found = model.generate(
            input_ids=batch,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=n_steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for s, row in enumerate(rows):
            alone = model.generate(
                input_ids=row[None],
                past_key_values=SphericalCache(model, rule),
                max_new_tokens=n_steps,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            for together, single in zip(found.logits, alone.logits, strict=True):
                assert (together[s] - single[0]).abs().max() < 1e-6
        sealed = [state.n_sealed for state in cache.states() if state is not None]
        assert sealed[0] == tuple(rule.n_sealed(n + n_steps - 1) for n in lengths)


def test_a_conversation_goes_on_from_its_cache(
    random_model: Model, frames: Frames, token_ids: Tensor
) -> None:
    model = random_model("qwen3")
    rule = rule_of(frames("none"), TierFormat.spherical(code_4222()))
    cache = SphericalCache(model, rule)
    first = model.generate(
        token_ids[None, :50], past_key_values=cache, max_new_tokens=9, do_sample=False
    )
    turn = torch.cat([first, token_ids[None, 50:70]], dim=1)
    second = model.generate(turn, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert second.shape[1] == 84
    # The last token that was generated is not in the cache yet.
    assert cache.get_seq_length() == 83
    again = SphericalCache(model, rule)
    run(model, second[0], again, [50, *[1] * 8, 21, *[1] * 4])
    for one, other in zip(cache.states(), again.states(), strict=True):
        assert one is not None and other is not None and one.n_sealed == other.n_sealed
        assert one.pages is not None and other.pages is not None
        assert torch.equal(one.pages.pool, other.pages.pool)


def test_beams_follow_their_sequences(
    random_model: Model, frames: Frames, token_ids: Tensor
) -> None:
    model = random_model("llama")
    rule = rule_of(frames("post_rope"), TierFormat.spherical(code_4222()), window=2)
    ids = torch.stack([token_ids[:40], token_ids[41:81]])
    cache = SphericalCache(model, rule)
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0, 1]))
        more = torch.stack([token_ids[k : k + 18] for k in (5, 9, 20)])
        found = [model(input_ids=more[:, i : i + 1], past_key_values=cache) for i in range(18)]
        for s, source in enumerate((1, 0, 1)):
            whole = torch.cat([ids[source], more[s]])
            single = run(model, whole, SphericalCache(model, rule), [40] + [1] * 18)
            for i in range(18):
                assert (found[i].logits[s, 0] - single[40 + i]).abs().max() < 1e-9
    generated = model.generate(
        ids, past_key_values=SphericalCache(model, rule), num_beams=3, max_new_tokens=8
    )
    assert generated.shape == (2, 48)


def test_cropping_takes_back_the_last_tokens(
    random_model: Model, frames: Frames, token_ids: Tensor
) -> None:
    model = random_model("llama")
    rule = rule_of(frames("post_rope"), TierFormat.spherical(code_4222()), window=8)
    cache = SphericalCache(model, rule)
    expected = run(model, token_ids[:60], cache, [50, *[1] * 10])
    run(model, token_ids[60:66], cache, [6])
    cache.crop(-6)
    assert cache.get_seq_length() == 60
    found = run(model, token_ids[60:62], cache, [1, 1])
    plain = run(model, token_ids[:62], SphericalCache(model, rule), [50, *[1] * 12])
    assert (found - plain[60:]).abs().max() < 1e-9 and len(expected) == 60
    before = [state.n_tail for state in cache.states() if state is not None]
    with pytest.raises(SphkvError, match="not sealed"):
        cache.crop(-40)
    assert [state.n_tail for state in cache.states() if state is not None] == before
    cache.reset()
    assert cache.get_seq_length() == 0
    assert (run(model, token_ids[:60], cache, [50, *[1] * 10]) - expected).abs().max() < 1e-9


def test_no_dense_copy_survives_and_memory_falls(
    random_model: Model, frames: Frames, token_ids: Tensor
) -> None:
    model = random_model("llama").float()
    ids = token_ids.repeat(5)[:500]
    rule = UniformRule.of(
        TierFormat.spherical(code_4222()), frames("post_rope"), page_size=32, window=32
    )

    least = 2 * 400 * HEAD_DIM

    def large_tensors() -> int:
        gc.collect()
        return sum(
            x.untyped_storage().nbytes()
            for x in gc.get_objects()
            # isinstance would wake lazy modules.
            if issubclass(type(x), Tensor) and x.is_floating_point() and x.numel() >= least
        )

    cache = SphericalCache(model, rule)
    before = large_tensors()
    with torch.inference_mode():
        model(input_ids=ids[None], past_key_values=cache, logits_to_keep=1)
    assert large_tensors() == before
    # 3.875 bits a coordinate and the window, tables and sinks, against 32 bits.
    assert cache.memory_bytes() - cache.frame_bytes < 0.3 * cache.dense_bytes(4)
    pools = [state.pages.pool.numel() for state in cache.states() if state and state.pages]
    assert cache.memory_bytes() > sum(pools) > 0.2 * cache.dense_bytes(2)
    dense = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=ids[None], past_key_values=dense, logits_to_keep=1)
    assert large_tensors() > before


def test_windowed_layers_forget_what_no_query_sees(
    random_model: Model, frames: Frames, token_ids: Tensor
) -> None:
    model = random_model("gemma3")
    rule = rule_of(frames("none"), TierFormat.spherical(code_4222()), window=4)
    cache = SphericalCache(model, rule)
    run(model, token_ids, cache, steps(70, token_ids))
    entries = [
        state.pages.page_table.n_entries for state in cache.states() if state and state.pages
    ]
    # Window 24 of 101 tokens: at most two pages of 16 and the tail; the full layer has all.
    assert entries[1] == 2 * (rule.n_sealed(101) // PAGE)
    assert entries[0] <= 4 and entries[2] <= 4


def test_memory_that_runs_out_leaves_the_cache_as_it_was(
    random_model: Model, frames: Frames, token_ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("llama")
    rule = rule_of(frames("none"), TierFormat.spherical(code_4222()), window=0)
    cache = SphericalCache(model, rule)
    run(model, token_ids[:47], cache, [40, *[1] * 7])
    from sphkv_cli.generation import layer_store

    whole, calls = layer_store.build_caches, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no")
        return whole(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(layer_store, "build_caches", failing)
        with pytest.raises(SphkvError, match="out of memory in layer 1"):
            run(model, token_ids[47:48], cache, [1])
    assert len(calls) == 2 and cache.get_seq_length() == 47
    found = run(model, token_ids[47:60], cache, [1] * 13)
    expected = run(model, token_ids[:60], SphericalCache(model, rule), [40, *[1] * 20])
    assert (found - expected[47:]).abs().max() < 1e-9


@pytest.mark.parametrize("kind", [KernelBuildError, KernelLaunchError, PageError])
def test_a_kernel_that_does_not_run_here_is_found_at_construction(
    kind: type[Exception],
    random_model: Model,
    frames: Frames,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sphkv_cli.generation import trial

    def refuse(*_: object) -> None:
        raise kind("cuModuleLoadData failed")

    monkeypatch.setattr(trial, "_try_step", refuse)
    rule = rule_of(frames("none"), TierFormat.spherical(code_4222()), window=0)
    with pytest.raises(SphkvError, match=r"layer 0: its pages cannot be read here \(cuModule"):
        SphericalCache(random_model("llama"), rule)


def test_an_interrupted_step_is_forgotten(
    random_model: Model, frames: Frames, token_ids: Tensor
) -> None:
    model = random_model("llama")
    rule = rule_of(frames("none"), TierFormat.spherical(code_4222()), window=0)
    cache = SphericalCache(model, rule)
    run(model, token_ids[:47], cache, [40, *[1] * 7])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for module in (model.model.layers[2], model.model.layers[1].mlp):
        hook = module.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, token_ids[47:48], cache, [1])
        hook.remove()
    found = run(model, token_ids[47:60], cache, [1] * 13)
    expected = run(model, token_ids[:60], SphericalCache(model, rule), [40, *[1] * 20])
    assert (found - expected[47:]).abs().max() < 1e-9


def test_what_cannot_work_is_refused_at_once(
    random_model: Model, frames: Frames, token_ids: Tensor
) -> None:
    model = random_model("llama")
    rule = rule_of(frames("none"), TierFormat.dense())
    with pytest.raises(EnvironmentUnable, match="CUDA backend needs the model on a GPU"):
        SphericalCache(model, rule, backend="cuda")
    with pytest.raises(UsageError, match="unknown"):
        SphericalCache(model, rule, backend="gpu")  # type: ignore[arg-type]
    with pytest.raises(SphkvError, match="training"):
        SphericalCache(random_model("llama").train(), rule)
    cache = SphericalCache(model, rule)
    with pytest.raises(SphkvError, match="context is 512"):
        run(model, token_ids.repeat(6), cache, [606])
    assert cache.get_seq_length() == 0
    run(model, token_ids, cache, [50])
    with pytest.raises(SphkvError, match="a batch of 2"):
        model(input_ids=token_ids[None, :1].repeat(2, 1), past_key_values=cache)
    with pytest.raises(SphkvError, match="position_ids"):
        model(
            input_ids=token_ids[None, :1],
            past_key_values=cache,
            position_ids=torch.tensor([[70]]),
        )
    assert cache.get_seq_length() == 50


def test_a_model_without_such_a_cache_attends_as_before(
    random_model: Model, frames: Frames, token_ids: Tensor
) -> None:
    for family in ("llama", "gemma2"):
        model = random_model(family)
        expected = model(input_ids=token_ids[None], use_cache=False).logits
        SphericalCache(model, rule_of(frames("none"), TierFormat.dense()))
        found = model(input_ids=token_ids[None], use_cache=False).logits
        assert (found - expected).abs().max() < 1e-9
        stepped = run(model, token_ids, DynamicCache(config=model.config), steps(30, token_ids))
        assert (stepped - expected[0]).abs().max() < 1e-9


def test_pages_are_tried_before_the_first_token(
    random_model: Model, frames: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sphkv_cli.generation import coded_part
    from sphkv_kernels.tier import PageError

    tried = []

    def refusing(*args: Any, **kwargs: Any) -> Any:
        tried.append((kwargs["window"], kwargs["logit_softcap"]))
        if len(tried) == 2:
            raise PageError("no such page")
        return whole(*args, **kwargs)

    whole = coded_part.ada_decode_reference
    monkeypatch.setattr(coded_part, "ada_decode_reference", refusing)
    model = random_model("gemma2")
    before = model.config._attn_implementation
    with pytest.raises(SphkvError, match=r"layer 1: its pages cannot be read here \(no such"):
        SphericalCache(model, rule_of(frames("none"), TierFormat.int8()))
    # A windowed layer and a full one, and the model is left as it was.
    assert tried == [(24, 5.0), (0, 5.0)]
    assert model.config._attn_implementation == before
