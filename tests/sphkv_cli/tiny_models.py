"""Tiny models on disk with a tokenizer of bytes, for tests that run the pipeline from its start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Fill = Callable[[str, torch.Tensor, torch.Tensor], None]


def fill_matrices(name: str, weight: torch.Tensor, noise: torch.Tensor) -> None:
    """Matrices that keep the size of what goes through them; vectors as they are."""
    if weight.ndim > 1:
        weight.copy_(noise * (1.0 if "embed" in name else weight.shape[-1] ** -0.5))


def save_model(folder: Path, config: Any, *, seed: int = 7, fill: Fill = fill_matrices) -> Path:
    """A model of random weights and its tokenizer; fill(name, weight, standard normal noise)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            fill(name, weight, torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def save_llama(folder: Path, *, seed: int = 7) -> Path:
    """A llama of 2 layers, 4 query and 2 KV heads of 32 coordinates."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
    return save_model(folder, config, seed=seed)
