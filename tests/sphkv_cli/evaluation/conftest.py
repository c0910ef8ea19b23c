"""Tiny random models of several families in float64, so that two ways of computing must agree."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices on several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _config(family: str) -> Any:
    import transformers

    if family == "llama":
        return transformers.LlamaConfig(**SHAPE)
    if family == "qwen2":
        return transformers.Qwen2Config(**SHAPE)
    # Two windowed layers around a full one, soft caps on the final logits.
    return transformers.Gemma3TextConfig(
        **SHAPE,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=24,
        query_pre_attn_scalar=32,
        final_logit_softcapping=30.0,
    )


@pytest.fixture(scope="session")
def judged() -> Callable[[str], Any]:
    """A judged random model by family: llama, qwen2 or gemma3."""
    from transformers import AutoModelForCausalLM

    from sphkv_cli.evaluation.judged_model import JudgedModel

    made: dict[str, JudgedModel] = {}

    def of(family: str) -> JudgedModel:
        if family not in made:
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
            made[family] = JudgedModel.of(model.requires_grad_(False))
        return made[family]

    return of


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    """71 tokens: no multiple of any group or block, two groups of 32 among them."""
    return torch.randint(0, 128, (71,), generator=torch.Generator().manual_seed(3))
