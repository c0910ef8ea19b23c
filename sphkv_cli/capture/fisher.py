"""How much the next-token distribution minds an error in one query head's attention output.

With o_s the output of a head at position s and y_t a label drawn from the model's own p(. | x_<=t),

    F = E_s ||g_s||^2 / head_dim,      g_s = d/do_s sum_t log p(y_t | x_<=t)

Scores of different t are uncorrelated and have mean zero, so E g_s g_s^T is the Fisher information
of all predictions that follow.  To second order an isotropic error e_s therefore costs
F ||e_s||^2 / 2 nats of KL, summed over those predictions.  Labels are sampled, never the text's
own: that would be the empirical Fisher, which is not the curvature of the KL.  Source: the Fisher
information and its Monte Carlo estimate as usual; per head of attention, ours.

Memory: every decoder layer is computed again on the way back (checkpointing), and logits are made
a chunk of positions at a time; what stays is one hidden state per layer and token.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sphkv_cli.capture.recorder import attention_function
from sphkv_cli.errors import SphkvError
from sphkv_cli.models.geometry import ModelGeometry
from sphkv_cli.models.head import language_head

Float = npt.NDArray[np.float64]

_CHUNK = 128


@dataclass(frozen=True)
class HeadFisher:
    """F and its standard error over the passes, each (n_layers, n_q_heads) float64."""

    mean: Float
    standard_error: Float

    @staticmethod
    def of_passes(passes: Sequence[Float], n_positions: Sequence[int]) -> "HeadFisher":
        """Mean over positions of all passes.

        Args:
            passes: per document (n_samples, n_layers, n_q_heads), means over its positions.
            n_positions: per document, its weight.
        """
        values = np.concatenate(passes)
        weights = np.repeat(np.array(n_positions, float), [len(each) for each in passes])
        weights /= weights.sum()
        mean = np.tensordot(weights, values, axes=1)
        if len(values) < 2:
            return HeadFisher(mean, np.full(mean.shape, np.nan))
        spread = np.tensordot(weights**2, (values - mean) ** 2, axes=1)
        return HeadFisher(mean, np.sqrt(spread * len(values) / (len(values) - 1)))


def fisher_passes(
    model: Any,
    geometry: ModelGeometry,
    modules: Sequence[Any],
    token_ids: npt.NDArray[np.integer[Any]],
    *,
    n_samples: int,
    attention: str,
    generator: torch.Generator,
) -> Float:
    """One forward and `n_samples` backward passes of one document.

    Args:
        modules: the attention modules, in layer order.
        token_ids: (n_tokens).
        attention: "sdpa" or "eager".
        generator: of the labels, on the CPU.

    Returns:
        (n_samples, n_layers, n_q_heads) mean over positions of ||g||^2 / head_dim.

    Raises:
        SphkvError: a gradient that is not finite, or a layer without attention; names the layer.
    """
    tap = _GradientTap(modules, (n_samples, geometry.n_layers, geometry.n_q_heads))
    ids = torch.from_numpy(token_ids.astype("int64"))[None].to(model.device)
    with _tapped(model, geometry, tap, attention), torch.enable_grad():
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        for sample in range(n_samples):
            tap.sample = sample
            gradient = _score_gradient(language_head(model), hidden[0].detach(), generator)
            keep = sample + 1 < n_samples
            torch.autograd.backward([hidden], [gradient[None]], retain_graph=keep)
    found: Float = tap.sums / (ids.shape[1] * geometry.head_dim)
    for index, layer in enumerate(geometry.layers):
        if index not in tap.heard:
            raise SphkvError(
                f"layer {layer.name} never called attention, so it has no gradient",
                "capture without --fisher",
            )
        if not np.isfinite(found[:, index]).all():
            raise SphkvError(
                f"the gradient of layer {layer.name} is not finite",
                "run the model in another --dtype (float16 overflows)",
            )
    return found


def _score_gradient(
    head: Callable[[Tensor], Tensor], hidden: Tensor, generator: torch.Generator
) -> Tensor:
    """Gradient of sum_t log p(y_t) in the final hidden states (n_tokens, hidden_dim)."""
    gradient = torch.empty_like(hidden)
    for start in range(0, hidden.shape[0], _CHUNK):
        rows = slice(start, start + _CHUNK)
        leaf = hidden[rows].clone().requires_grad_()
        logs = torch.log_softmax(head(leaf).float(), dim=-1)
        # Drawn by the CPU's generator, so that a seed means the same labels on every device.
        uniform = torch.rand(logs.shape[0], 1, generator=generator, dtype=torch.float64)
        cumulative = logs.detach().double().exp().cumsum(dim=-1)
        target = uniform.to(cumulative.device) * cumulative[:, -1:]
        labels = torch.searchsorted(cumulative, target, right=True)
        labels.clamp_(max=logs.shape[1] - 1)
        torch.autograd.backward([logs.gather(1, labels).sum()])
        assert leaf.grad is not None
        gradient[rows] = leaf.grad
    return gradient


class _GradientTap:
    """Adds up ||g||^2 of every attention output; sums: (n_samples, n_layers, n_q_heads)."""

    def __init__(self, modules: Sequence[Any], shape: tuple[int, int, int]) -> None:
        self.sums = np.zeros(shape)
        self.sample = 0
        self.heard: set[int] = set()
        self._layer_of = {id(module): index for index, module in enumerate(modules)}

    def listen(self, module: Any, output: Tensor) -> None:
        """Hook one attention output, (1, n_tokens, n_q_heads, head_dim)."""
        layer = self._layer_of.get(id(module))
        if layer is not None and output.requires_grad:
            output.register_hook(functools.partial(self._add, layer))  # type: ignore[no-untyped-call]

    def _add(self, layer: int, gradient: Tensor) -> None:
        self.heard.add(layer)
        squares = gradient[0].double().square().sum(dim=(0, 2))
        self.sums[self.sample, layer] += squares.cpu().numpy()


_ACTIVE: ContextVar[_GradientTap | None] = ContextVar("sphkv_gradient_tap", default=None)


@contextmanager
def _tapped(
    model: Any, geometry: ModelGeometry, tap: _GradientTap, attention: str
) -> Iterator[None]:
    """While inside, gradients flow from the embeddings on, layers are checkpointed and tapped."""
    before = model.config._attn_implementation
    token = _ACTIVE.set(tap)
    layers = [model.get_submodule(layer.name.rpartition(".")[0]) for layer in geometry.layers]
    undo: list[tuple[Any, Any]] = []
    hook = model.get_input_embeddings().register_forward_hook(_require_gradient)
    model.set_attn_implementation(_register(attention))
    try:
        for layer in layers:
            undo.append((layer, vars(layer).get("forward")))
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for layer, original in undo:
            if original is None:
                del layer.forward
            else:
                layer.forward = original
        hook.remove()
        model.set_attn_implementation(before)
        _ACTIVE.reset(token)


def _require_gradient(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_()


def _register(attention: str) -> str:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = f"sphkv_tapped_{attention}"
    AttentionInterface.register(name, _tap_after(attention))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[attention])
    return name


def _tap_after(attention: str) -> Callable[..., Any]:
    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> Any:
        compute = attention_function(attention, module)
        output = compute(module, query, key, value, attention_mask, **options)
        tap = _ACTIVE.get()
        if tap is not None:
            tap.listen(module, output[0])
        return output

    return forward
