"""The drop-in cache on a GPU: the kernel's tokens are those of the reference, and memory falls."""

import gc
from typing import Any

import numpy as np
import pytest
import torch

from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.tier import TierFormat
from tests.gpu.cases import needs_cuda

pytest.importorskip("transformers", reason="the extra `hf` is not installed")
pytestmark = [pytest.mark.gpu, needs_cuda]

HEAD_DIM, N_LAYERS = 64, 2
# Kernel against float64 on the same codes, through two layers and a head of random weights.
RELATIVE = 2e-2


def random_model(family: str, head_dim: int = HEAD_DIM) -> Any:
    import transformers

    shape = {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if family == "llama":
        config = transformers.LlamaConfig(**shape)
    else:
        config = transformers.Gemma3TextConfig(
            **shape,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=100,
            query_pre_attn_scalar=head_dim,
        )
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to("cuda")
    return model.requires_grad_(False)


def frames(centring: str) -> FrameSet:
    rotation = Rotation("hadamard", HEAD_DIM, 42)
    if centring == "none":
        return FrameSet(rotation)
    rng = np.random.default_rng(5)
    mean = rng.normal(0, 0.5, (N_LAYERS, 2, HEAD_DIM)).astype(np.float32)
    if centring == "post_rope":
        return FrameSet(rotation, "post_rope", mean)
    inv_freq = 10000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    table = np.tile(inv_freq, (N_LAYERS, 1)).astype(np.float32)
    return FrameSet(rotation, "pre_rope", mean, inv_freq=table)


def code_4222() -> TierFormat:
    return TierFormat.spherical(
        SphericalCode.analytic("polar-4222-r2", HEAD_DIM, (4, 2, 2, 2), "lloyd_max:2")
    )


@pytest.mark.parametrize(
    "family, centring", [("llama", "none"), ("llama", "pre_rope"), ("gemma3", "post_rope")]
)
def test_kernel_and_reference_give_the_same_logits(family: str, centring: str) -> None:
    from sphkv_cli.generation.placement import UniformRule
    from sphkv_cli.generation.spherical_cache import SphericalCache

    model = random_model(family)
    rule = UniformRule.of(code_4222(), frames(centring), page_size=32, window=8)
    ids = torch.randint(1, 256, (3, 320), device="cuda")
    mask = torch.ones((3, 320), dtype=torch.int64, device="cuda")
    mask[1, :77] = 0
    found = {}
    for backend in ("cuda", "reference"):
        cache = SphericalCache(model, rule, backend=backend)  # type: ignore[arg-type]
        rows, stop = [], 0
        with torch.inference_mode():
            # A prompt, a second portion, then single steps over two seals.
            for n in (200, 50, *[1] * 70):
                start, stop = stop, stop + n
                output = model(
                    ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, start:stop],
                    past_key_values=cache,
                )
                rows.append(output.logits[:, -1])
        found[cache.backend] = torch.stack(rows)
        sealed = [state.n_sealed for state in cache.states() if state is not None]
        assert min(sealed[0]) >= 196
    error = (found["cuda"] - found["reference"]).abs().max()
    assert float(error) < RELATIVE * float(found["reference"].abs().max())


def test_the_allocator_sees_less_than_a_dense_cache() -> None:
    from sphkv_cli.generation.placement import UniformRule

    model = random_model("llama").to(torch.bfloat16)
    rule = UniformRule.of(code_4222(), frames("none"))
    # What does not grow with the tokens (lookup tables, workspaces) is in both and drops out.
    (held, counted, dense), more = _held(model, rule, 1000), _held(model, rule, 4000)
    growth = more[0] - held, more[1] - counted, more[2] - dense
    # 3.25 bits of 16, the page table and the plan.
    assert growth[0] < 0.3 * growth[2]
    assert growth[1] == pytest.approx(growth[0], rel=0.1)


def _held(model: Any, rule: Any, n_tokens: int) -> tuple[int, int, int]:
    """Bytes that the allocator, the cache itself and a dense cache count for 32 sequences: the
    allocator's blocks may be a megabyte larger than what lies in them."""
    from sphkv_cli.generation.spherical_cache import SphericalCache

    cache = SphericalCache(model, rule)
    ids = torch.randint(1, 256, (32, n_tokens), device="cuda")
    gc.collect()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        model(ids, past_key_values=cache, logits_to_keep=1)
    gc.collect()
    held = torch.cuda.memory_allocated() - before
    return held, cache.memory_bytes(), cache.dense_bytes()
