"""Tiny random models of several families in float64, so that two ways of computing must agree."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation

HEAD_DIM = 32
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices on several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _config(family: str) -> Any:
    import transformers

    windows = ["sliding_attention", "full_attention", "sliding_attention"]
    if family == "llama":
        return transformers.LlamaConfig(**SHAPE)
    if family == "qwen2":
        return transformers.Qwen2Config(**SHAPE)
    if family == "qwen3":
        return transformers.Qwen3Config(**SHAPE)
    if family == "mistral":
        return transformers.MistralConfig(**SHAPE, sliding_window=24)
    if family == "gemma2":
        return transformers.Gemma2Config(
            **SHAPE, layer_types=windows, sliding_window=24, attn_logit_softcapping=5.0
        )
    return transformers.Gemma3TextConfig(
        **SHAPE, layer_types=windows, sliding_window=24, query_pre_attn_scalar=32
    )


@pytest.fixture(scope="session")
def random_model() -> Callable[[str], Any]:
    """A random model by family; every call makes a new one with the same weights."""
    from transformers import AutoModelForCausalLM

    def make(family: str) -> Any:
        model = AutoModelForCausalLM.from_config(_config(family)).double().eval()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                if weight.ndim == 1:
                    weight += 0.3 * noise
                else:
                    scale = 1.0 if "embed" in name else weight.shape[-1] ** -0.5
                    weight.copy_(noise * scale)
        return model.requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    """101 tokens: no multiple of a page."""
    return torch.randint(1, 128, (101,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def frames() -> Callable[[str], FrameSet]:
    """Hadamard frames with key means, of one centring."""
    mean = np.random.default_rng(5).normal(0, 0.5, (3, 2, HEAD_DIM)).astype(np.float32)

    def of(centring: str) -> FrameSet:
        rotation = Rotation("hadamard", HEAD_DIM, 42)
        if centring == "none":
            return FrameSet(rotation)
        if centring == "post_rope":
            return FrameSet(rotation, "post_rope", mean)
        inv_freq = 10000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        return FrameSet(
            rotation, "pre_rope", mean, inv_freq=np.tile(inv_freq, (3, 1)).astype(np.float32)
        )

    return of
