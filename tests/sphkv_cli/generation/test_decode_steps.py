"""Single tokens with pages sealed into slots, against the same cache that makes every state anew.

The tail of the steps is bfloat16 in the frame, so logits agree to its rounding and no further; the
codes, which tokens are where, and what a slot without tokens holds are compared exactly.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sphkv_cli.errors import SphkvError
from sphkv_cli.generation import page_reserve, step_layer
from sphkv_cli.generation.decode_graph import DecodeGraph
from sphkv_cli.generation.decode_steps import DecodeSteps
from sphkv_cli.generation.layer_frame import LayerFrame, Turns
from sphkv_cli.generation.page_reserve import PageReserve
from sphkv_cli.generation.placement import UniformRule
from sphkv_cli.generation.spherical_cache import SphericalCache
from sphkv_cli.generation.step_clock import StepClock
from sphkv_cli.generation.step_layer import StepLayer
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.page_table import PageTable
from sphkv_kernels.reference import ada_decode_reference
from sphkv_kernels.tier import TierFormat

PAGE, HEAD_DIM = 16, 32
# A tail of bfloat16 (2^-9 a number) in three layers, relative to the largest logit.
ROUNDING = 1e-2

Model = Callable[[str], Any]
Frames = Callable[[str], FrameSet]


@pytest.fixture(autouse=True)
def _few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots run out twice in a test."""
    monkeypatch.setattr(page_reserve, "_LEAST", 2)


def cache_of(model: Any, frames: FrameSet, stepping: bool) -> SphericalCache:
    # In int8 a rounding that decides another code moves a logit by little.
    rule = UniformRule.of(TierFormat.int8(), frames, page_size=PAGE, window=8, first_tokens=0)
    cache = SphericalCache(model, rule)
    cache._may_step = cache._steps_fit = stepping
    return cache


def ids_of(n_sequences: int, n: int) -> Tensor:
    return torch.randint(1, 128, (n_sequences, n), generator=torch.Generator().manual_seed(3))


def run(
    model: Any, cache: SphericalCache, ids: Tensor, portions: list[int], start: int = 0
) -> Tensor:
    rows = []
    with torch.inference_mode():
        for n in portions:
            step = ids[:, start : start + n]
            rows.append(model(input_ids=step, past_key_values=cache).logits[:, -1])
            start += n
    return torch.stack(rows)


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert torch.isfinite(found).all()
    assert float((found - expected).abs().max()) < ROUNDING * float(expected.abs().max())


def counts(cache: SphericalCache) -> list[tuple[Any, ...]]:
    return [(s.n_tail, s.n_sealed, s.next_position) for s in cache.states() if s is not None]


@pytest.mark.parametrize("centring", ["none", "post_rope", "pre_rope", "residual", "balanced"])
def test_new_tokens_enter_the_frame_as_the_frame_set_says(frames: Frames, centring: str) -> None:
    rng = np.random.default_rng(1)
    framed = frames({"balanced": "none", "residual": "pre_rope"}.get(centring, centring))
    if centring == "residual":
        residual = rng.normal(size=(3, 2, HEAD_DIM)).astype(np.float32)
        framed = replace(framed, residual_mean=residual)
    if centring == "balanced":
        balancing = np.eye(HEAD_DIM) + 0.1 * rng.normal(size=(3, 2, HEAD_DIM, HEAD_DIM))
        framed = FrameSet(Rotation("haar", HEAD_DIM, 42), balancing=balancing)
    layer = LayerFrame.of(framed, 1, 4, 2, torch.device("cpu"), uses_kernel=False)
    q, k, v = (torch.from_numpy(rng.normal(size=(5, n, HEAD_DIM))) for n in (4, 2, 2))
    positions = torch.tensor([0, 3, 99, 70_000, 131_071])
    turns = Turns(positions.to(torch.int32))
    tail = torch.full((2, 5, 2, 7, HEAD_DIM), torch.nan, dtype=torch.bfloat16)
    rows = 7 * torch.arange(20) + 3
    asked = layer.enter(q, k, v, tail=tail, rows=rows, turns=turns, with_offset=True)
    torch.testing.assert_close(asked.query, framed.queries_to_frame(1, q), rtol=0, atol=1e-5)
    expected = torch.stack([framed.keys_to_frame(1, k, positions), framed.values_to_frame(v)])
    torch.testing.assert_close(tail[:, :, :, 3].double(), expected.double(), rtol=8e-3, atol=1e-5)
    assert bool(tail.isfinite().sum() == 20 * HEAD_DIM)
    assert (asked.term is not None) == (centring in ("pre_rope", "residual"))
    assert (asked.offset is not None) == (centring in ("post_rope", "residual"))
    # The law: what the frame takes from a key comes back with the query.
    exact = torch.einsum("ngsd,msd->ngsm", q.view(5, 2, 2, HEAD_DIM).transpose(1, 2), k)
    of_frame = asked.query.view(5, 2, 2, HEAD_DIM).transpose(1, 2)
    logits = torch.einsum("ngsd,msd->ngsm", of_frame, expected[0].double())
    logits = logits.transpose(1, 2).reshape(5, 4, 5)
    if asked.offset is not None:
        logits = logits + asked.offset[:, :, None]
    if asked.term is not None:
        rows = positions.expand(10, 5)
        logits = logits + asked.term.logits(torch.arange(10), rows).view(5, 4, 5)
    torch.testing.assert_close(logits, exact.transpose(1, 2).reshape(5, 4, 5), rtol=0, atol=3e-4)
    if centring == "pre_rope":
        # Another layer that turns alike does not make the angles again.
        other = LayerFrame.of(framed, 2, 4, 2, torch.device("cpu"), uses_kernel=False)
        assert layer.turning is not None and other.turning is not None
        made = turns.of(layer.turning, torch.float64)
        assert framed.inv_freq is not None
        angles = positions[:, None] * torch.from_numpy(framed.inv_freq[1].copy()).double()
        for found, of_angle in zip(made, (angles.cos(), angles.sin()), strict=True):
            torch.testing.assert_close(found[:, 0], of_angle.repeat(1, 2), rtol=0, atol=1e-12)
        assert turns.of(other.turning, torch.float64) is made
        assert turns.of(replace(layer.turning, digest=b"others"), torch.float64) is not made
        assert turns.of(layer.turning, torch.float32) is not made


@pytest.mark.parametrize(
    "family, centring",
    [("llama", "pre_rope"), ("gemma2", "post_rope"), ("gemma3", "none")],
)
def test_steps_into_slots_are_steps_of_new_states(
    random_model: Model, frames: Frames, family: str, centring: str
) -> None:
    model, ids = random_model(family), ids_of(2, 110)
    found = {}
    for stepping in (False, True):
        cache = cache_of(model, frames(centring), stepping)
        found[stepping] = run(model, cache, ids, [20, *[1] * 52, 20, *[1] * 8])
        assert (cache._steps is not None) == stepping
        found[stepping, "counts"] = counts(cache)
    assert_near(found[True], found[False])
    assert found[True, "counts"] == found[False, "counts"]


def test_new_slots_leave_out_unused_ones_in_every_layer(
    random_model: Model, frames: Frames
) -> None:
    model, ids, found = random_model("llama"), ids_of(2, 90), {}
    for stepping in (False, True):
        cache = cache_of(model, frames("none"), stepping)
        before = run(model, cache, ids, [20, *[1] * 15])
        if stepping:
            assert cache._steps is not None
            cache._steps.make_room()
            assert [one.reserve.is_twin for one in cache._steps._layers] == [False, True, True]
        found[stepping] = torch.cat([before, run(model, cache, ids, [1] * 40, start=35)])
    assert_near(found[True], found[False])


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_a_step_asks_for_offsets_where_logits_are_capped(
    random_model: Model, frames: Frames, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def recorded(*args: Any, **options: Any) -> Any:
        given.append(options["logit_offset"] is not None)
        return ada_decode_reference(*args, **options)

    monkeypatch.setattr(step_layer, "ada_decode_reference", recorded)
    model = random_model(family)
    run(model, cache_of(model, frames("post_rope"), True), ids_of(1, 22), [20, 1, 1])
    assert len(given) >= 6 and set(given) == {family == "gemma2"}


def test_sequences_of_their_own_lengths_seal_when_they_are_due(
    random_model: Model, frames: Frames
) -> None:
    model, ids, n_prompt = random_model("llama"), ids_of(3, 70), 40
    mask = torch.ones_like(ids)
    mask[1, :11], mask[2, :27] = 0, 0
    where = (mask.cumsum(1) - 1).clamp(min=0)
    found = {}
    for stepping in (False, True):
        cache, rows, start = cache_of(model, frames("none"), stepping), [], 0
        with torch.inference_mode():
            for stop in (n_prompt, *range(n_prompt + 1, 71)):
                output = model(
                    ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=where[:, start:stop],
                    past_key_values=cache,
                )
                rows.append(output.logits[:, -1])
                start = stop
        found[stepping], found[stepping, "counts"] = torch.stack(rows), counts(cache)
    assert_near(found[True], found[False])
    assert found[True, "counts"] == found[False, "counts"]
    assert len(set(found[True, "counts"][0][1])) > 1


def test_slots_without_tokens_are_never_read(random_model: Model, frames: Frames) -> None:
    model, ids = random_model("llama"), ids_of(2, 60)
    cache, poisoned = (cache_of(model, frames("none"), True) for _ in range(2))
    for one in (cache, poisoned):
        run(model, one, ids, [30, 1])
    assert poisoned._steps is not None
    for layer in poisoned._steps._layers:
        layer.reserve.block.fill_(255)  # NaN in every floating-point field
    assert torch.equal(
        run(model, cache, ids, [1] * 20, 31), run(model, poisoned, ids, [1] * 20, 31)
    )


def test_sealed_pages_hold_the_bytes_of_their_tail(random_model: Model, frames: Frames) -> None:
    """A page that was sealed into a slot is the page that the same tail is encoded to."""
    from sphkv_kernels.encode import encode

    model, ids = random_model("llama"), ids_of(2, 60)
    cache = cache_of(model, frames("none"), True)
    run(model, cache, ids, [30, 1])
    steps = cache._steps
    assert steps is not None
    start = 31
    while steps.n_tail[0] < 8 + PAGE - 1:
        run(model, cache, ids, [1], start)
        start += 1
    before = [layer.tail.clone() for layer in steps._layers]
    used = steps._n_used[0]
    run(model, cache, ids, [1], start)
    assert steps._n_used[0] == used + 1 and steps.n_tail[0] == 8
    for layer, tail in zip(steps._layers, before, strict=True):
        # The oldest page of the tail had been there before the last token came.
        keys, values = tail[:, 1, 1, None, :PAGE]
        page = encode(cache.rule.tiers[0], keys, values)[0]
        entry = int(layer.reserve.entries[1, 1, used])
        pages = layer.reserve.pages
        offset = int(pages.page_table.offsets[entry])
        assert torch.equal(pages.pool[offset : offset + page.numel()], page)
        assert int(pages.page_table.live_tokens[entry]) == PAGE


def test_cropped_and_interrupted_steps_leave_no_trace(random_model: Model, frames: Frames) -> None:
    model, ids = random_model("llama"), ids_of(1, 60)
    cache, once = (cache_of(model, frames("none"), True) for _ in range(2))
    expected = run(model, once, ids, [30, *[1] * 20])
    run(model, cache, ids, [30, 1, 1, 1])
    cache.crop(-2)
    last = model.model.layers[-1].self_attn.o_proj
    hook = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(model, cache, ids, [1], 31)
    hook.remove()
    # The last layer had attended: its step counts, and generation may take it back.
    cache.crop(-1)
    first = model.model.layers[0].self_attn.o_proj
    hook = first.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(model, cache, ids, [1], 31)
    hook.remove()
    assert torch.equal(run(model, cache, ids, [1] * 19, 31), expected[2:])


def test_beams_go_the_long_way_and_keep_their_tokens(random_model: Model, frames: Frames) -> None:
    model, ids = random_model("llama"), ids_of(2, 80)
    cache, swapped = cache_of(model, frames("none"), True), cache_of(model, frames("none"), True)
    run(model, cache, ids, [40, *[1] * 9])
    run(model, swapped, ids, [40, *[1] * 9])
    swapped.reorder_cache(torch.tensor([1, 0]))
    expected = run(model, cache, ids, [1] * 20, 49)
    found = run(model, swapped, ids.flip(0), [1] * 20, 49)
    assert_near(found.flip(1), expected)
    swapped.reset()
    assert swapped._may_step


def test_what_no_code_holds_is_refused_and_stays_dense(random_model: Model, frames: Frames) -> None:
    model, ids = random_model("llama"), ids_of(1, 80)
    cache = cache_of(model, frames("none"), True)
    run(model, cache, ids, [30, 1])
    assert cache._steps is not None
    for layer in cache._steps._layers[1:]:
        layer.tail[1, 0, 0, 3] = float("nan")
    with pytest.raises(SphkvError, match="layer 1"):
        run(model, cache, ids, [1] * 20, 31)
    sealed, tail = cache._steps.n_sealed[0], cache._steps.n_tail[0]
    assert tail == 8 + PAGE and sealed + tail == cache.n_columns


def test_a_bfloat16_model_steps_of_itself(random_model: Model, frames: Frames) -> None:
    model, ids = random_model("llama").to(torch.bfloat16), ids_of(2, 60)
    rule = UniformRule.of(TierFormat.int8(), frames("none"), page_size=PAGE, window=8)
    cache = SphericalCache(model, rule)
    # Its first tokens have a dense page of their own, which is sealed the usual way.
    run(model, cache, ids, [20, 1])
    assert cache._steps is None
    run(model, cache, ids, [1] * 9, 21)
    assert cache._steps is not None and counts(cache)[0][1] == (20, 20)


def storages(held: Any) -> Iterator[Any]:
    """Of all tensors below an object of the steps; the frames and the rule are not theirs."""
    if isinstance(held, Tensor):
        yield held.untyped_storage()
    elif isinstance(held, (list, tuple)):
        for one in held:
            yield from storages(one)
    elif isinstance(held, (DecodeSteps, StepLayer, StepClock, PageReserve, PagedCache, PageTable)):
        for name, one in vars(held).items():
            if name not in ("store", "reader", "_rule"):
                yield from storages(one)


def test_bytes_of_the_steps_are_those_of_their_tensors(random_model: Model, frames: Frames) -> None:
    model, ids = random_model("llama"), ids_of(2, 80)
    cache = cache_of(model, frames("none"), True)
    run(model, cache, ids, [60])
    before = cache.memory_bytes()
    run(model, cache, ids, [1], 60)
    steps = cache._steps
    assert steps is not None
    slots = sum(layer.reserve.block.numel() for layer in steps._layers)
    tails = steps._tails.nbytes
    # Every storage that a step reaches once, whatever shares it.
    held = {s.data_ptr(): s.nbytes() for s in storages(steps)}
    assert cache.memory_bytes() == sum(held.values()) + cache.frame_bytes
    assert cache.memory_bytes() - before < slots + tails + 4096


def test_pages_behind_a_sliding_window_are_freed_by_steps_too(
    random_model: Model, frames: Frames
) -> None:
    model = random_model("gemma3")
    cache = cache_of(model, frames("none"), stepping=True)
    run(model, cache, ids_of(1, 400), [40, *[1] * 300])
    assert cache._steps is not None
    entries = [
        int((s.pages.page_table.live_tokens > 0).sum()) for s in cache.states() if s and s.pages
    ]
    windows = [layer.window for layer in cache.geometry.layers]
    whole = max(entries)
    for n, window in zip(entries, windows, strict=True):
        # Pages of 16 in two heads; slots are made anew, and pages freed, every few seals.
        assert n == whole if not window else n <= 2 * (window // PAGE + 2 + 6) < whole


def test_a_tail_that_cannot_be_sealed_never_runs_past_its_room(
    random_model: Model, frames: Frames
) -> None:
    model, ids = random_model("llama"), ids_of(2, 120)
    cache = cache_of(model, frames("none"), stepping=True)
    run(model, cache, ids, [30, 1])
    assert cache._steps is not None
    for layer in cache._steps._layers[1:]:
        layer.tail[1, 0, 0, 3] = float("nan")
    n_failed = 0
    for i in range(31, 120):
        try:
            run(model, cache, ids, [1], i)
        except SphkvError as error:
            assert "layer 1: a key or value cannot be coded" in str(error)
            n_failed += 1
        assert cache.n_columns == i + 1 == cache.next_positions()[0]
    assert n_failed > 60


def test_vectors_beyond_the_code_are_refused_by_steps_with_the_layer_named(
    random_model: Model, frames: Frames
) -> None:
    code = SphericalCode.analytic("paper", HEAD_DIM, (4, 2, 2, 2), "fp16")
    tier = TierFormat.spherical(code)
    rule = UniformRule.of(tier, frames("none"), page_size=PAGE, window=8, first_tokens=0)
    model, ids = random_model("llama"), ids_of(1, 60)
    cache = SphericalCache(model, rule)
    cache._may_step = cache._steps_fit = True
    run(model, cache, ids, [30, 1])
    assert cache._steps is not None
    cache._steps._layers[2].tail[0, 0, 0, :3] = 1e6
    with pytest.raises(SphkvError, match="layer 2: a key or value cannot be coded"):
        run(model, cache, ids, [1] * 20, 31)


def test_what_was_interrupted_is_undone_before_steps_are_entered(
    random_model: Model, frames: Frames
) -> None:
    model, ids = random_model("llama"), ids_of(1, 80)
    cache, whole = (cache_of(model, frames("none"), stepping=True) for _ in range(2))
    for one in (cache, whole):
        run(model, one, ids, [40])

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run(model, cache, ids, [10], 40)
    hook.remove()
    cache.undo()
    steps = cache.enter_steps()
    assert steps is not None and steps.next_position == [40] == [cache.n_columns]
    assert_near(run(model, cache, ids, [1] * 5, 40), run(model, whole, ids, [1] * 5, 40))


def test_an_interrupt_after_the_last_layer_does_not_advance_the_clock(
    random_model: Model, frames: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = random_model("llama"), ids_of(1, 80)
    cache, whole = (cache_of(model, frames("none"), stepping=True) for _ in range(2))
    for one in (cache, whole):
        run(model, one, ids, [30, 1])

    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "end_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(model, cache, ids, [1], 31)
    monkeypatch.undo()
    assert cache._steps is not None
    assert cache._steps.clock.position_ids.flatten().tolist() == [31]
    assert_near(run(model, cache, ids, [1] * 10, 31), run(model, whole, ids, [1] * 10, 31))


def test_a_graph_gives_the_model_its_own_forward_back(random_model: Model) -> None:
    class OnGpu:
        backend, takes_steps = "cuda", True

    model = random_model("llama")
    for own in (None, lambda *arguments, **options: None):
        if own is not None:
            model.forward = own
        with DecodeGraph(model, OnGpu()):  # type: ignore[arg-type]
            assert model.__dict__["forward"] is not own
        assert model.__dict__.get("forward") is own
    del model.forward
