"""What attention looks like in each layer of a model, and which models are refused, by layer.

The codes need keys of one head_dim, a power of two, that attention reads as they are: so multi-head
latent attention (MLA), state-space and linear-attention layers, chunked attention and learned sink
logits are refused where they stand. Works on a skeleton without weights as well.
"""

import re
from dataclasses import dataclass
from typing import Any

from sphkv_cli.errors import SphkvError

_MLA_MARKS = ("kv_a_proj_with_mqa", "kv_b_proj", "kv_lora_rank")
_NOT_ATTENTION = re.compile(
    r"Mamba|SSM|DeltaNet|ShortConv|LinearAttention|LightningAttention|Recurrent|Rwkv|RWKV|LSTM"
    r"|RetNet|Retention"
)
_OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "wo", "c_proj")
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's attention: `window` in tokens (0 = all), `logit_softcap` (0 = none)."""

    name: str
    layer_type: str
    window: int
    softmax_scale: float
    logit_softcap: float


@dataclass(frozen=True)
class ModelGeometry:
    """The shape of a model's attention, the same in every layer."""

    architecture: str
    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    max_tokens: int
    layers: tuple[AttentionLayer, ...]

    @property
    def n_layers(self) -> int:
        """Number of attention layers."""
        return len(self.layers)


def inspect_model(model: Any) -> tuple[ModelGeometry, tuple[Any, ...]]:
    """The geometry of a transformers causal model and its attention modules, in layer order.

    Raises:
        SphkvError: a layer that cannot be captured, named, with the reason.
    """
    config = model.config.get_text_config(decoder=True)
    class_name = type(model).__name__
    prefix, layers = _decoder_layers(model, config)
    modules = tuple(_attention_of(layer, f"{prefix}.{i}") for i, layer in enumerate(layers))
    if not model._can_set_attn_implementation():
        raise SphkvError(
            f"{class_name}: layer {prefix}.0 does not call attention through transformers' "
            "AttentionInterface, so what it receives cannot be recorded",
            "choose another model, or a newer transformers",
        )
    names = tuple(f"{prefix}.{i}.{name}" for i, (name, _) in enumerate(modules))
    described = tuple(
        _describe(module, config, index, name)
        for index, (name, (_, module)) in enumerate(zip(names, modules, strict=True))
    )
    n_q_heads = int(config.num_attention_heads)
    n_kv_heads = int(getattr(config, "num_key_value_heads", None) or n_q_heads)
    head_dims = [_head_dim(module, config) for _, module in modules]
    for name, head_dim in zip(names, head_dims, strict=True):
        if head_dim < 2 or head_dim & (head_dim - 1):
            raise SphkvError(
                f"layer {name} has head_dim {head_dim}, which is not a power of two",
                "choose another model",
            )
        if head_dim != head_dims[0]:
            raise SphkvError(
                f"layer {name} has head_dim {head_dim}, layer {names[0]} {head_dims[0]}",
                "models with more than one head_dim are not supported",
            )
    geometry = ModelGeometry(
        architecture=str(config.model_type),
        n_q_heads=n_q_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dims[0],
        max_tokens=int(getattr(config, "max_position_embeddings", None) or 2**31 - 1),
        layers=described,
    )
    return geometry, tuple(module for _, module in modules)


def output_projection(attention: Any, name: str, n_q_heads: int, head_dim: int) -> Any:
    """The linear map from the concatenated heads back to the hidden state.

    Raises:
        SphkvError: there is none of the expected width; the layer is named.
    """
    for child_name, child in attention.named_children():
        width = getattr(child, "in_features", None)
        if child_name in _OUTPUT_NAMES and width == n_q_heads * head_dim:
            return child
    raise SphkvError(
        f"layer {name} has no output projection of {n_q_heads * head_dim} inputs",
        "choose another model",
    )


def rope_description(model: Any) -> dict[str, Any]:
    """Rotary parameters of a loaded model, JSON-able.

    `parameters` is the configuration's own (theta, scaling, for each layer type where they differ);
    `inv_freq` lists, by layer type ("default" where all share one), the inverse frequencies in
    radians per token that the rotary module holds, `attention_scaling` the factor on cos and sin.
    """
    config = model.config.get_text_config(decoder=True)
    inv_freq: dict[str, list[float]] = {}
    scaling: dict[str, float] = {}
    for module in model.get_decoder().modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name:
                layer_type = name.removesuffix("inv_freq").rstrip("_") or "default"
                inv_freq[layer_type] = [float(x) for x in buffer.double().cpu().tolist()]
                factor = getattr(module, name.replace("inv_freq", "attention_scaling"), 1.0)
                scaling[layer_type] = float(factor)
    return {
        "parameters": getattr(config, "rope_parameters", None) or {},
        "inv_freq": inv_freq,
        "attention_scaling": scaling,
    }


def _decoder_layers(model: Any, config: Any) -> tuple[str, Any]:
    from torch import nn

    decoder = model.get_decoder()
    n_layers = int(config.num_hidden_layers)
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == n_layers:
            return next(full for full, m in model.named_modules() if m is child), child
    raise SphkvError(
        f"{type(model).__name__} has no list of {n_layers} decoder layers", "choose another model"
    )


def _attention_of(layer: Any, name: str) -> tuple[str, Any]:
    found = []
    for child_name, child in layer.named_modules():
        kind = type(child).__name__
        if _NOT_ATTENTION.search(kind):
            full_name = f"{name}.{child_name}" if child_name else name
            raise SphkvError(
                f"layer {full_name} ({kind}) keeps a state instead of keys and values "
                "(state-space or linear attention)",
                "choose a model whose every layer is softmax attention",
            )
        if kind.endswith("Attention"):
            found.append((child_name, child))
    if not found:
        raise SphkvError(
            f"layer {name} ({type(layer).__name__}) has no softmax attention",
            "choose a model whose every layer is softmax attention",
        )
    if len(found) > 1:
        raise SphkvError(
            f"layer {name} has {len(found)} attentions ({', '.join(n for n, _ in found)})",
            "only decoders with one self-attention per layer are supported",
        )
    return found[0]


def _head_dim(module: Any, config: Any) -> int:
    own = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def _describe(module: Any, config: Any, index: int, name: str) -> AttentionLayer:
    kind = type(module).__name__
    if any(getattr(module, mark, None) is not None for mark in _MLA_MARKS):
        raise SphkvError(
            f"layer {name} ({kind}) is multi-head latent attention (MLA): its cache holds latents, "
            "not keys and values",
            "choose a model with multi-head or grouped-query attention",
        )
    if getattr(module, "sinks", None) is not None:
        raise SphkvError(
            f"layer {name} ({kind}) adds learned sink logits, which a capture does not hold",
            "choose another model",
        )
    types = getattr(config, "layer_types", None)
    window = int(getattr(config, "sliding_window", None) or 0)
    if types:
        layer_type = str(types[index])
        if layer_type not in LAYER_TYPES:
            raise SphkvError(
                f"layer {name} is of type {layer_type}, only {' and '.join(LAYER_TYPES)} can be "
                "captured",
                "choose another model",
            )
        window = window if layer_type == "sliding_attention" else 0
    else:
        if not getattr(config, "use_sliding_window", True):
            window = 0
        layer_type = "sliding_attention" if window else "full_attention"
    scale = getattr(module, "scaling", None) or _head_dim(module, config) ** -0.5
    softcap = getattr(config, "attn_logit_softcapping", None) or 0.0
    return AttentionLayer(name, layer_type, window, float(scale), float(softcap))
