"""F against its definition: all labels enumerated, gradients taken where the heads are joined."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.capture.fisher import HeadFisher, fisher_passes
from sphkv_cli.capture.options import CaptureOptions, TextSource
from sphkv_cli.capture.stage import capture
from sphkv_cli.errors import ArtifactError
from sphkv_cli.models.geometry import inspect_model

N_TOKENS, VOCABULARY = 7, 11


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(3)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.5,
        final_logit_softcapping=5.0,
    )
    return Gemma2ForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def token_ids() -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, VOCABULARY, N_TOKENS)


@pytest.fixture(scope="module")
def exact(model: Any, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """sum over t and all labels of p(y_t) E_s ||d log p(y_t) / d o_s||^2 / head_dim."""
    geometry, modules = inspect_model(model)
    joined: list[torch.Tensor] = []

    def keep(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        joined.append(inputs[0].detach().requires_grad_() if not joined else inputs[0])
        return (joined[-1],)

    hooks = [module.o_proj.register_forward_pre_hook(keep) for module in modules]
    try:
        logs = torch.log_softmax(model(torch.from_numpy(token_ids)[None]).logits[0], dim=-1)
    finally:
        for hook in hooks:
            hook.remove()
    found = np.zeros((geometry.n_layers, geometry.n_q_heads))
    for t in range(N_TOKENS):
        for label in range(VOCABULARY):
            gradients = torch.autograd.grad(logs[t, label], joined, retain_graph=True)
            for layer, gradient in enumerate(gradients):
                heads = gradient[0].reshape(N_TOKENS, geometry.n_q_heads, geometry.head_dim)
                squares = heads.double().square().sum(-1).mean(0) / geometry.head_dim
                found[layer] += float(logs[t, label].detach().exp()) * squares.numpy()
    return found


def _sampled(model: Any, token_ids: npt.NDArray[np.int64], n_samples: int, **kind: Any) -> Any:
    geometry, modules = inspect_model(model)
    passes = fisher_passes(
        model,
        geometry,
        modules,
        token_ids,
        n_samples=n_samples,
        attention="eager",
        generator=torch.Generator().manual_seed(1),
        **kind,
    )
    return HeadFisher.of_passes([passes], [len(token_ids)])


def test_sampled_labels_estimate_the_fisher_information_without_bias(
    model: Any, token_ids: npt.NDArray[np.int64], exact: npt.NDArray[np.float64]
) -> None:
    found = _sampled(model, token_ids, 300)
    # Two layers of four heads: the largest of eight normal deviates.
    assert (np.abs(found.mean - exact) / found.standard_error).max() < 4
    assert (found.standard_error / exact).max() < 0.2


def test_the_standard_error_shrinks_with_the_samples(
    model: Any, token_ids: npt.NDArray[np.int64]
) -> None:
    few, many = (_sampled(model, token_ids, n).standard_error.mean() for n in (20, 180))
    # Ninefold samples: a third, known to a fifth or so from twenty of them.
    assert 2.0 < few / many < 4.5
    assert np.isnan(_sampled(model, token_ids, 1).standard_error).all()


def test_the_model_is_as_before_and_bfloat16_agrees(
    model: Any, token_ids: npt.NDArray[np.int64], exact: npt.NDArray[np.float64]
) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    ids = torch.from_numpy(token_ids)[None]
    before = half(ids).logits
    found = _sampled(half, token_ids, 300)
    # bfloat16 rounds weights to .4 %, the rest is sampling.
    np.testing.assert_allclose(found.mean, exact, rtol=0.4)
    assert not half(ids).logits.requires_grad
    assert all("forward" not in vars(layer) for layer in half.model.layers)
    assert torch.equal(half(ids).logits, before)


@pytest.fixture
def options(llama: Path, texts: tuple[Path, ...]) -> CaptureOptions:
    return CaptureOptions(
        model=str(llama),
        texts=tuple(TextSource(path) for path in texts),
        document_tokens=96,
        max_tokens=6 * 96,
        fisher=True,
        fisher_tokens=64,
    )


def test_a_capture_holds_fisher_weights_that_depend_on_the_seed_alone(
    options: CaptureOptions, tmp_path: Path
) -> None:
    found = []
    for index, chosen in enumerate((options, options, replace(options, seed=7))):
        path = tmp_path / f"{index}.h5"
        capture(chosen, path)
        with CaptureReader(path) as reader:
            assert reader.fisher is not None
            assert reader.fisher.shape == (3, 4) == reader.fisher_standard_error.shape
            assert (reader.fisher_standard_error > 0).all()
            found.append((reader.fisher, reader.digest))
    assert found[0][1] == found[1][1]
    assert (found[0][0] != found[2][0]).any()
    np.testing.assert_allclose(np.log(found[0][0]), np.log(found[2][0]), atol=1.5)


def test_without_the_option_there_are_none(options: CaptureOptions, tmp_path: Path) -> None:
    capture(replace(options, fisher=False), tmp_path / "capture.h5")
    with CaptureReader(tmp_path / "capture.h5") as reader:
        assert reader.fisher is None


def test_a_resumed_capture_must_sample_alike(
    options: CaptureOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sphkv_cli.capture.assemble as module

    def stop(*args: Any, **kinds: Any) -> Callable[..., Any]:
        raise KeyboardInterrupt

    output = tmp_path / "capture.h5"
    with monkeypatch.context() as patch:
        patch.setattr(module, "assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            capture(options, output)
    with pytest.raises(ArtifactError, match="fisher_samples"):
        capture(replace(options, fisher_samples=3), output, resume=True)
    capture(options, output, resume=True)
    with CaptureReader(output) as reader:
        assert reader.fisher is not None
