"""Small random models with a byte tokenizer, saved as a folder like any other model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices on several threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def _randomize(model: Any) -> None:
    """Give every parameter, norms and biases included, values that matter."""
    import torch

    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight += 0.3 * noise
            else:
                weight.copy_(noise * (1.0 if "embed" in name else weight.shape[-1] ** -0.5))


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """Make a random model of a transformers configuration, and save it with a tokenizer."""

    def save(config: Any, **dtype: Any) -> Path:
        from transformers import AutoModelForCausalLM

        folder = tmp_path_factory.mktemp(config.model_type)
        model = AutoModelForCausalLM.from_config(config)
        _randomize(model)
        model.to(**dtype).save_pretrained(folder) if dtype else model.save_pretrained(folder)
        _save_tokenizer(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def llama(save_model: Callable[[Any], Path]) -> Path:
    """A llama of 3 layers, 4 query and 2 KV heads, head_dim 32."""
    from transformers import LlamaConfig

    return save_model(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=4096,
        )
    )


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, ...]:
    """Three texts of different content, long enough for several documents each."""
    paths = []
    for name, word in (("one.txt", "alpha"), ("two.txt", "beta"), ("three.txt", "gamma")):
        path = tmp_path / name
        path.write_text(" ".join(f"{word} {i * i}" for i in range(150)))
        paths.append(path)
    return tuple(paths)
