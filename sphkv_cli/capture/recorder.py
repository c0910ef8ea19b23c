"""Listens to attention: q, k, v exactly as softmax(scale q.k) v receives them.

transformers hands every layer's tensors to a function of its AttentionInterface. We register two of
our own, which pass them on unchanged to `sdpa` or to the model's `eager` function, and tell the
recorder first. The masks are those of the function passed on to. Keys before RoPE are the argument
of the model's own `apply_rotary_pos_emb`, hence after qk-norm and bit for bit what was rotated
(turning rotated keys back would lose bits in a 16-bit model).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from sphkv_cli.errors import SphkvError
from sphkv_cli.models.geometry import ModelGeometry

ATTENTIONS = ("auto", "sdpa", "eager")


@dataclass(frozen=True)
class LayerChunk:
    """What one layer's attention received for the newest tokens of a document.

    `first` is the position of the first of them; tensors are on the model's device, in its dtype:
    keys, values, keys_pre_rope (n_tokens, n_kv_heads, head_dim), queries (n_tokens, n_q_heads,
    head_dim).
    """

    layer: int
    first: int
    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    keys_pre_rope: torch.Tensor | None


Sink = Callable[[LayerChunk], None]


class AttentionRecorder:
    """Gives every layer's chunk of the running forward pass to `sink`, and checks its shape."""

    def __init__(
        self, geometry: ModelGeometry, modules: Sequence[Any], *, pre_rope: bool, sink: Sink
    ) -> None:
        self._geometry = geometry
        self._layer_of = {id(module): index for index, module in enumerate(modules)}
        self._pre_rope = pre_rope
        self._sink = sink
        self._first = 0
        self._heard: set[int] = set()
        self._key_before_rope: torch.Tensor | None = None

    def expect(self, first: int) -> None:
        """Announce a forward pass whose first token stands at position `first`."""
        self._first = first
        self._heard.clear()

    def check_complete(self) -> None:
        """Raise SphkvError, naming the first layer, unless the last pass used every layer."""
        for index, layer in enumerate(self._geometry.layers):
            if index not in self._heard:
                raise SphkvError(
                    f"layer {layer.name} never called attention, so it cannot be captured",
                    "its architecture is not supported",
                )

    def hear(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: dict[str, Any],
    ) -> None:
        """Record one call of attention; tensors are (1, heads, tokens, head_dim)."""
        layer = self._layer_of.get(id(module))
        if layer is None:
            return
        described = self._geometry.layers[layer]
        self._check(described.name, query, key, value)
        for name in ("position_bias", "s_aux"):
            if options.get(name) is not None:
                raise SphkvError(
                    f"layer {described.name} adds {name} to its logits, which a capture does not "
                    "hold",
                    "its architecture is not supported",
                )
        scale = options.get("scaling")
        if scale is not None and abs(float(scale) - described.softmax_scale) > 1e-9:
            raise SphkvError(
                f"layer {described.name} scales its logits by {scale}, expected "
                f"{described.softmax_scale}",
                "its architecture is not supported",
            )
        n_tokens = query.shape[2]
        before = self._key_before_rope
        self._key_before_rope = None
        if self._pre_rope and (before is None or before.shape != key[:, :, -n_tokens:].shape):
            raise SphkvError(
                f"layer {described.name} has no rotary step that can be listened to",
                "capture without --pre-rope",
            )
        self._heard.add(layer)
        self._sink(
            LayerChunk(
                layer=layer,
                first=self._first,
                keys=_newest(key, n_tokens),
                values=_newest(value, n_tokens),
                queries=_newest(query, n_tokens),
                keys_pre_rope=None if before is None else _newest(before, n_tokens),
            )
        )

    def hear_key_before_rope(self, key: torch.Tensor) -> None:
        """Keep the key that is about to be rotated, for the attention call that follows."""
        self._key_before_rope = key

    def _check(
        self, name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        shape = self._geometry
        expected = (shape.n_q_heads, shape.n_kv_heads, shape.n_kv_heads)
        found = (query.shape[1], key.shape[1], value.shape[1])
        if found != expected:
            raise SphkvError(
                f"layer {name} passes {found} query, key and value heads, expected {expected}",
                "its architecture is not supported",
            )
        widths = (query.shape[-1], key.shape[-1], value.shape[-1])
        if widths != (shape.head_dim,) * 3:
            raise SphkvError(
                f"layer {name} passes queries, keys and values of width {widths}, expected "
                f"{shape.head_dim} each",
                "its architecture is not supported",
            )


@contextmanager
def recording(
    model: Any, modules: Sequence[Any], recorder: AttentionRecorder, *, attention: str
) -> Iterator[None]:
    """While inside, `recorder` hears the attention of `model`; afterwards the model is as before.

    `attention` is "sdpa" or "eager": what computes the output.
    """
    pre_rope = recorder._pre_rope
    before = model.config._attn_implementation
    token = _ACTIVE.set(recorder)
    undo = _listen_to_rope(modules, recorder) if pre_rope else []
    model.set_attn_implementation(_register(attention))
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for namespace, original in undo:
            namespace["apply_rotary_pos_emb"] = original
        _ACTIVE.reset(token)


def choose_attention(model: Any, geometry: ModelGeometry, requested: str) -> str:
    """ "sdpa" or "eager" for "auto"; sdpa cannot cap logits, nor can every model use it."""
    possible = bool(model._supports_sdpa) and not any(x.logit_softcap for x in geometry.layers)
    if requested == "sdpa" and not possible:
        raise SphkvError(
            f"{type(model).__name__} cannot run with sdpa attention", "pass --attention eager"
        )
    if requested == "auto":
        return "sdpa" if possible else "eager"
    return requested


_ACTIVE: ContextVar[AttentionRecorder | None] = ContextVar("sphkv_attention_recorder", default=None)


def _newest(x: torch.Tensor, n_tokens: int) -> torch.Tensor:
    return x[0, :, -n_tokens:].transpose(0, 1)


def _register(attention: str) -> str:
    """Register our attention function, idempotently; it records only inside `recording`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = f"sphkv_recorded_{attention}"
    AttentionInterface.register(name, _record_then(attention))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[attention])
    return name


def _record_then(attention: str) -> Callable[..., Any]:
    def forward(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **options: Any,
    ) -> Any:
        recorder = _ACTIVE.get()
        if recorder is not None:
            recorder.hear(module, query, key, value, options)
        return attention_function(attention, module)(
            module, query, key, value, attention_mask, **options
        )

    return forward


def attention_function(attention: str, module: Any) -> Callable[..., Any]:
    """What computes "sdpa" or "eager" attention in `module`."""
    return _sdpa() if attention == "sdpa" else _eager_of(module)


def _sdpa() -> Callable[..., Any]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    function: Callable[..., Any] = sdpa_attention_forward
    return function


def _eager_of(module: Any) -> Callable[..., Any]:
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise SphkvError(
            f"{type(module).__name__} has no eager attention function", "pass --attention sdpa"
        )
    found: Callable[..., Any] = function
    return found


def _listen_to_rope(
    modules: Sequence[Any], recorder: AttentionRecorder
) -> list[tuple[dict[str, Any], Any]]:
    """Wrap `apply_rotary_pos_emb` in the modules' own namespaces; returns what puts it back."""
    undo = []
    for module_name in sorted({type(module).__module__ for module in modules}):
        namespace = vars(sys.modules[module_name])
        original = namespace.get("apply_rotary_pos_emb")
        if original is None:
            raise SphkvError(
                f"{module_name} has no apply_rotary_pos_emb to listen to",
                "capture without --pre-rope",
            )

        def heard(q: Any, k: Any, *rest: Any, _original: Any = original, **options: Any) -> Any:
            recorder.hear_key_before_rope(k)
            return _original(q, k, *rest, **options)

        namespace["apply_rotary_pos_emb"] = heard
        undo.append((namespace, original))
    return undo
