"""What is captured is what attention receives, for every supported architecture.

The truth is computed here in float64 from each attention module's own weights and input: its
projections, query-key normalisation and rotation are written out again. And the captured tensors
must explain the attention's output: softmax over the window of scale q.k, soft cap, times v.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.capture.options import CaptureOptions, TextSource
from sphkv_cli.capture.stage import capture

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
N_TOKENS = 96
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA3_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Case:
    """An architecture: its configuration, and what the capture must say of each layer."""

    config: str
    options: dict[str, Any]
    head_dim: int = 32
    windows: tuple[int, ...] = (0, 0, 0)
    theta: float = 1e4
    norm_offset: float | None = None  # None: no qk-norm; gemma multiplies by 1 + weight
    softcap: float = 0.0

    def angles(self, layer: int, n_tokens: int) -> torch.Tensor:
        """Rotation angles (n_tokens, head_dim / 2) of a layer, float64."""
        theta, factor = self.theta, 1.0
        if self.config == "Gemma3TextConfig":
            rope = GEMMA3_ROPE[GEMMA3_TYPES[layer]]
            theta, factor = float(rope["rope_theta"]), float(rope.get("factor", 1.0))
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        return torch.arange(n_tokens, dtype=torch.float64)[:, None] * (theta**-exponent / factor)


CASES = {
    "llama": Case("LlamaConfig", {"head_dim": 32}),
    "qwen2": Case(
        "Qwen2Config",
        {"hidden_size": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
        theta=5e4,
    ),
    "qwen3": Case("Qwen3Config", {"head_dim": 32}, norm_offset=0.0),
    "mistral": Case("MistralConfig", {"head_dim": 32, "sliding_window": 20}, windows=(20,) * 3),
    "gemma3": Case(
        "Gemma3TextConfig",
        {
            "head_dim": 256,
            "sliding_window": 17,
            "query_pre_attn_scalar": 100,
            "layer_types": GEMMA3_TYPES,
            "rope_parameters": GEMMA3_ROPE,
        },
        head_dim=256,
        windows=(17, 0, 17),
        norm_offset=1.0,
    ),
    "phi3": Case("Phi3Config", {"hidden_size": 128}),
    "gemma2": Case(
        "Gemma2Config",
        {
            "head_dim": 32,
            "sliding_window": 30,
            "attn_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        windows=(30, 0, 30),
        softcap=3.0,
    ),
}


@dataclass(frozen=True)
class Captured:
    """A capture of one architecture, its case, and the folder of its model."""

    case: Case
    folder: Path
    path: Path


@pytest.fixture(scope="module", params=sorted(CASES))
def captured(
    request: pytest.FixtureRequest,
    save_model: Callable[[Any], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Captured:
    """Capture three documents with every query, before and after RoPE, in float32."""
    case = CASES[request.param]
    folder = save_model(getattr(transformers, case.config)(**SHAPE | case.options))
    where = tmp_path_factory.mktemp("capture")
    output = where / "capture.h5"
    capture(options(folder, where), output)
    return Captured(case, folder, output)


def options(folder: Path, where: Path, **changes: Any) -> CaptureOptions:
    text = where / "text.txt"
    text.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(3 * N_TOKENS)))
    settings: dict[str, Any] = {
        "model": str(folder),
        "texts": (TextSource(text),),
        "document_tokens": N_TOKENS,
        "query_stride": 1,
        "pre_rope": True,
        "store_dtype": "float32",
    }
    return CaptureOptions(**settings | changes)


def attention_inputs_and_outputs(
    folder: Path, token_ids: np.ndarray
) -> list[tuple[Any, torch.Tensor, torch.Tensor]]:
    """(attention module, its input, its output before the output projection) of every layer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).requires_grad_(False)
    model.set_attn_implementation("eager")
    modules = [layer.self_attn for layer in model.model.layers]
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}
    for index, module in enumerate(modules):
        module.register_forward_pre_hook(
            lambda _m, args, kwargs, i=index: inputs.__setitem__(
                i, (args[0] if args else kwargs["hidden_states"])[0]
            ),
            with_kwargs=True,
        )
        module.o_proj.register_forward_pre_hook(
            lambda _m, args, i=index: outputs.__setitem__(i, args[0][0])
        )
    model(torch.from_numpy(token_ids)[None])
    return [(module, inputs[i], outputs[i]) for i, module in enumerate(modules)]


def project(module: Any, hidden: torch.Tensor, case: Case) -> tuple[torch.Tensor, ...]:
    """q, k, v (n_tokens, heads, head_dim) before RoPE, from the weights."""
    n_q, n_kv, d = 4, 2, case.head_dim
    if hasattr(module, "qkv_proj"):
        fused = hidden @ module.qkv_proj.weight.T
        q, k, v = fused.split([n_q * d, n_kv * d, n_kv * d], dim=-1)
    else:
        q, k, v = (
            hidden @ linear.weight.T + (0 if linear.bias is None else linear.bias)
            for linear in (module.q_proj, module.k_proj, module.v_proj)
        )
    q, k, v = q.reshape(-1, n_q, d), k.reshape(-1, n_kv, d), v.reshape(-1, n_kv, d)
    if case.norm_offset is not None:
        q, k = (
            x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (case.norm_offset + norm.weight)
            for x, norm in ((q, module.q_norm), (k, module.k_norm))
        )
    return q, k, v


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (j, j + head_dim / 2) of (n_tokens, heads, head_dim) by `angles`."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, scale: float, window: int, softcap: float
) -> np.ndarray:
    """softmax(cap(scale q.k)) v over the window: (n_tokens, n_q_heads * head_dim), float64."""
    n_tokens, n_q, d = q.shape
    k, v = (np.repeat(x.astype(np.float64), n_q // k.shape[1], axis=1) for x in (k, v))
    logits = np.einsum("qhd,khd->hqk", q.astype(np.float64), k) * scale
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    back = np.arange(n_tokens)[:, None] - np.arange(n_tokens)[None]
    hidden = (back < 0) | ((back >= window) if window else False)
    logits = np.where(hidden, -np.inf, logits)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(n_tokens, n_q * d)


# float32 arithmetic of the model against float64 here: products of 64-256 terms of order one.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-4}


def test_captured_tensors_equal_those_of_the_weights(captured: Captured) -> None:
    case = captured.case
    with CaptureReader(captured.path) as reader:
        assert (reader.n_q_heads, reader.n_kv_heads, reader.head_dim) == (4, 2, case.head_dim)
        truth = attention_inputs_and_outputs(captured.folder, reader.token_ids(2))
        assert reader.query_positions(2).tolist() == list(range(N_TOKENS))
        for layer, (module, hidden, _) in enumerate(truth):
            q, k, v = project(module, hidden, case)
            angles = case.angles(layer, N_TOKENS)
            expected = {
                "queries": rotate(q, angles),
                "keys": rotate(k, angles),
                "values": v,
                "keys_pre_rope": k,
            }
            for name, tensor in expected.items():
                found = getattr(reader, name)(2, layer)
                np.testing.assert_allclose(
                    found, tensor.detach().numpy(), err_msg=f"{name} of layer {layer}", **TOLERANCE
                )


def test_captured_tensors_explain_the_output_of_attention(captured: Captured) -> None:
    with CaptureReader(captured.path) as reader:
        assert tuple(layer.window for layer in reader.layers) == captured.case.windows
        assert {layer.logit_softcap for layer in reader.layers} == {captured.case.softcap}
        truth = attention_inputs_and_outputs(captured.folder, reader.token_ids(1))
        for layer, (_, _, output) in enumerate(truth):
            info = reader.layers[layer]
            found = attend(
                reader.queries(1, layer),
                reader.keys(1, layer),
                reader.values(1, layer),
                scale=info.softmax_scale,
                window=info.window,
                softcap=info.logit_softcap,
            )
            np.testing.assert_allclose(found, output.numpy(), **TOLERANCE)


def test_output_weight_is_the_norm_of_the_heads_output_block(captured: Captured) -> None:
    model = AutoModelForCausalLM.from_pretrained(captured.folder)
    with CaptureReader(captured.path) as reader:
        for layer, decoder_layer in enumerate(model.model.layers):
            weight = decoder_layer.self_attn.o_proj.weight.detach().double().numpy()
            for head in range(4):
                block = weight[:, head * reader.head_dim : (head + 1) * reader.head_dim]
                expected = np.linalg.norm(block) ** 2 / reader.head_dim
                assert reader.output_weight[layer, head] == pytest.approx(expected, rel=1e-6)


def test_rope_of_the_artifact_turns_keys_before_into_keys_after(captured: Captured) -> None:
    with CaptureReader(captured.path) as reader:
        frequencies = reader.rope["inv_freq"]
        for layer, info in enumerate(reader.layers):
            inv_freq = torch.tensor(
                frequencies.get(info.layer_type, frequencies.get("default")), dtype=torch.float64
            )
            angles = torch.arange(N_TOKENS, dtype=torch.float64)[:, None] * inv_freq
            before = torch.from_numpy(reader.keys_pre_rope(0, layer)).double()
            # The model computes its angles in float32: up to 96 radians, so 4e-6 off.
            np.testing.assert_allclose(
                rotate(before, angles).numpy(), reader.keys(0, layer), rtol=1e-4, atol=1e-4
            )


def test_chunked_prefill_captures_the_same(captured: Captured, tmp_path: Path) -> None:
    chunked = tmp_path / "chunked.h5"
    capture(options(captured.folder, tmp_path, prefill_tokens=37), chunked)
    with CaptureReader(captured.path) as whole, CaptureReader(chunked) as parts:
        for layer in range(whole.n_layers):
            for name in ("keys", "values", "queries", "keys_pre_rope"):
                np.testing.assert_allclose(
                    getattr(parts, name)(0, layer), getattr(whole, name)(0, layer), **TOLERANCE
                )
            np.testing.assert_allclose(
                parts.query_second_moment(layer), whole.query_second_moment(layer), **TOLERANCE
            )


def test_the_model_is_left_as_it_was(captured: Captured) -> None:
    from sphkv_cli.capture.recorder import AttentionRecorder, recording
    from sphkv_cli.models.geometry import inspect_model

    model = AutoModelForCausalLM.from_pretrained(captured.folder)
    geometry, modules = inspect_model(model)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        before = model(ids).logits
        heard: list[int] = []
        recorder = AttentionRecorder(
            geometry, modules, pre_rope=True, sink=lambda chunk: heard.append(chunk.layer)
        )
        implementation = model.config._attn_implementation
        with (
            pytest.raises(ZeroDivisionError),
            recording(model, modules, recorder, attention="eager"),
        ):
            model(ids)
            raise ZeroDivisionError
        assert heard == [0, 1, 2]
        assert model.config._attn_implementation == implementation
        after = model(ids).logits
    assert heard == [0, 1, 2]
    assert torch.equal(before, after)
