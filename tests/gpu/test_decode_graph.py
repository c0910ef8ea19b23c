"""Steps of a bfloat16 model on a GPU: the kernel with its tail, seals into slots, and the graph."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation
from sphkv_kernels.tier import TierFormat
from tests.gpu.cases import needs_cuda
from tests.gpu.test_generation import HEAD_DIM, code_4222, frames, random_model

pytest.importorskip("transformers", reason="the extra `hf` is not installed")
pytestmark = [pytest.mark.gpu, needs_cuda]

# bfloat16 through two layers, sums in another order.
RELATIVE = 3e-2


@pytest.fixture(autouse=True)
def _few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots run out in a test."""
    from sphkv_cli.generation import page_reserve

    monkeypatch.setattr(page_reserve, "_LEAST", 2)


def cache_of(model: Any, backend: str = "auto", centring: str = "none") -> Any:
    from sphkv_cli.generation.placement import UniformRule
    from sphkv_cli.generation.spherical_cache import SphericalCache

    rule = UniformRule.of(code_4222(), frames(centring), page_size=32, window=8, first_tokens=0)
    return SphericalCache(model, rule, backend=backend)  # type: ignore[arg-type]


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert torch.isfinite(found).all()
    error = (found.float() - expected.float()).abs().max()
    assert float(error) < RELATIVE * float(expected.abs().max())


@pytest.mark.parametrize(
    "family, centring",
    [("llama", "none"), ("llama", "pre_rope"), ("gemma3", "post_rope"), ("gemma3", "none")],
)
def test_kernel_steps_are_reference_steps(family: str, centring: str) -> None:
    model = random_model(family).to(torch.bfloat16)
    ids = torch.randint(1, 256, (3, 280), device="cuda")
    mask = torch.ones((3, 280), dtype=torch.int64, device="cuda")
    mask[1, :77] = 0
    found = {}
    for backend in ("cuda", "reference"):
        cache, rows, stop = cache_of(model, backend, centring), [], 0
        with torch.inference_mode():
            for n in (160, *[1] * 100, 20):
                start, stop = stop, stop + n
                output = model(
                    ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, start:stop],
                    past_key_values=cache,
                )
                rows.append(output.logits[:, -1])
        found[backend] = torch.stack(rows)
    assert_near(found["cuda"], found["reference"])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_replayed_step_is_the_step(family: str) -> None:
    """Over seals, slots that run out, a crop, and a second portion of the conversation."""
    from sphkv_cli.generation.decode_graph import DecodeGraph

    model = random_model(family).to(torch.bfloat16)
    ids = torch.randint(1, 256, (2, 400), device="cuda")
    found, captures = {}, 0
    for graphed in (False, True):
        cache, rows = cache_of(model), []
        step = DecodeGraph(model, cache) if graphed else None
        with torch.inference_mode():
            model(ids[:, :150], past_key_values=cache)
            at = 150
            for n in (*[1] * 120, 40, *[1] * 60):
                part = ids[:, at : at + n]
                if step is not None and n == 1:
                    epoch = step._epoch
                    rows.append(step(part)[:, -1].clone())
                    captures += step._epoch != epoch
                else:
                    rows.append(model(part, past_key_values=cache).logits[:, -1])
                at += n
                if at == 200:
                    cache.crop(-3)
                    at -= 3
        found[graphed] = torch.stack(rows)
        assert cache.n_columns == at
        found[graphed, "memory"] = cache.memory_bytes()
    # The same launches; a library may choose others where it may not allocate.
    assert_near(found[True], found[False])
    assert found[True, "memory"] == found[False, "memory"]
    assert 2 <= captures <= 6


def test_another_batch_through_the_same_graph_finds_its_kernels_loaded() -> None:
    """Vectors are framed so many rows at a time, and no kernel can be loaded during a capture."""
    from sphkv_cli.generation.decode_graph import DecodeGraph
    from sphkv_kernels import framing, launch

    model = random_model("llama").to(torch.bfloat16)
    cache = cache_of(model)
    step = DecodeGraph(model, cache)
    for n_sequences in (1, 3):
        framing._function.cache_clear()
        launch._load.cache_clear()
        ids = torch.randint(1, 256, (n_sequences, 60), device="cuda")
        cache.reset()
        with torch.inference_mode():
            model(ids[:, :50], past_key_values=cache)
            rows = [step(ids[:, at : at + 1])[:, -1].clone() for at in range(50, 60)]
            expected = cache_of(model)
            plain = [model(ids[:, :50], past_key_values=expected).logits[:, -1:]]
            plain += [
                model(ids[:, at : at + 1], past_key_values=expected).logits for at in range(50, 60)
            ]
        assert_near(torch.stack(rows), torch.stack([one[:, -1] for one in plain[1:]]))


def test_nothing_is_built_once_the_steps_have_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at a seal nor when slots run out."""
    from sphkv_kernels import encode_launch, framing, launch

    model = random_model("llama").to(torch.bfloat16)
    cache, ids = cache_of(model), torch.randint(1, 256, (2, 160), device="cuda")
    encode_launch.encoder_for.cache_clear()
    framing._function.cache_clear()
    launch._load.cache_clear()

    def refused(*_: object) -> None:
        raise AssertionError("a kernel is loaded")

    with torch.inference_mode():
        model(ids[:, :50], past_key_values=cache)
        model(ids[:, 50:51], past_key_values=cache)
        for module in (encode_launch, framing, launch):
            monkeypatch.setattr(module, "load_function", refused)
        sealed = cache._steps.n_sealed[0]
        for at in range(51, 160):
            model(ids[:, at : at + 1], past_key_values=cache)
    assert cache._steps.n_sealed[0] >= sealed + 96


def test_a_head_that_the_kernel_does_not_have_is_refused_and_the_reference_reads_it() -> None:
    from sphkv_cli.errors import SphkvError
    from sphkv_cli.generation.placement import UniformRule
    from sphkv_cli.generation.spherical_cache import SphericalCache

    model = random_model("llama", head_dim=32).to(torch.bfloat16)
    ids = torch.randint(1, 256, (1, 90), device="cuda")
    frame = FrameSet(Rotation("hadamard", 32, 42))
    rule = UniformRule.of(TierFormat.int8(), frame, page_size=32, window=8, first_tokens=0)
    with pytest.raises(SphkvError, match="cannot be read here"):
        SphericalCache(model, rule, backend="cuda")
    cache = SphericalCache(model, rule, backend="reference")
    with torch.inference_mode():
        model(ids[:, :20], past_key_values=cache)
        for at in range(20, 90):
            found = model(ids[:, at : at + 1], past_key_values=cache).logits
    assert torch.isfinite(found).all()
    assert cache._steps.n_sealed[0] >= 64


def test_generate_through_the_graph_writes_the_same_tokens() -> None:
    from sphkv_cli.generation.decode_graph import DecodeGraph

    model = random_model("llama").to(torch.bfloat16)
    ids = torch.randint(1, 256, (2, 100), device="cuda")
    texts = []
    for graphed in (False, True):
        cache = cache_of(model)
        options = {"past_key_values": cache, "max_new_tokens": 60, "do_sample": False}
        if graphed:
            with DecodeGraph(model, cache) as graph:
                texts.append(model.generate(ids, **options))
            assert graph._graph is not None and "forward" not in model.__dict__
        else:
            texts.append(model.generate(ids, **options))
        assert cache.n_columns == 159
    # Greedy tokens of random weights: near ties may fall either way once.
    same = (texts[0] == texts[1]).float().mean()
    assert float(same) > 0.8


def test_int8_and_haar_rotations_step_as_well() -> None:
    from sphkv_cli.generation.placement import UniformRule
    from sphkv_cli.generation.spherical_cache import SphericalCache

    model = random_model("llama").to(torch.bfloat16)
    ids = torch.randint(1, 256, (1, 200), device="cuda")
    rule = UniformRule.of(TierFormat.int8(), FrameSet(Rotation("haar", HEAD_DIM, 1)), window=8)
    rows = {}
    for backend in ("cuda", "reference"):
        cache = SphericalCache(model, rule, backend=backend)  # type: ignore[arg-type]
        with torch.inference_mode():
            model(ids[:, :100], past_key_values=cache)
            rows[backend] = torch.stack(
                [
                    model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1]
                    for i in range(100, 200)
                ]
            )
    assert_near(rows["cuda"], rows["reference"])


def test_what_has_no_steps_is_refused_a_graph() -> None:
    from sphkv_cli.errors import SphkvError
    from sphkv_cli.generation.decode_graph import DecodeGraph

    model = random_model("llama")
    with pytest.raises(SphkvError, match="bfloat16"):
        DecodeGraph(model, cache_of(model))
