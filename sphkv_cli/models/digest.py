"""A digest that tells models apart without reading every weight.

SHA-256 over the entries of the configuration that change the function computed, and, for every
parameter in the order of names, its shape and 64 evenly spaced weights rounded to bfloat16. That
rounding makes the digest the same whether a checkpoint is run in bfloat16 or in float32; the choice
of entries makes it the same for every version of transformers, which adds entries with defaults.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

_SAMPLES = 64
_ENTRIES = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "layer_types",
    "sliding_window",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)


def model_digest(model: Any) -> str:
    """SHA-256 hex digest of a loaded transformers model, as the module says."""
    digest = hashlib.sha256(canonical_config(model.config).encode())
    samples = {name: _sample(weight) for name, weight in _weights(model)}
    for name in sorted(samples):
        digest.update(name.encode() + b" " + samples[name])
    return digest.hexdigest()


def _sample(weight: Any) -> bytes:
    import torch

    flat = weight.detach().reshape(-1)
    count = min(_SAMPLES, flat.numel())
    places = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).round().long()
    sample = flat[places.to(flat.device)].to(torch.bfloat16).cpu().view(torch.int16)
    return f"{tuple(weight.shape)}\n".encode() + bytes(sample.numpy().tobytes())


def canonical_config(config: Any) -> str:
    """The entries of a configuration that change the function computed, as JSON."""
    text = config.get_text_config(decoder=True)
    entries = {name: getattr(text, name, None) for name in _ENTRIES}
    return json.dumps(entries, sort_keys=True, default=str)


def _weights(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of every parameter; those that accelerate has put away are fetched in turn."""
    if not any(weight.is_meta for weight in model.parameters()):
        yield from model.named_parameters()
        return
    from accelerate.utils import align_module_device

    for prefix, module in model.named_modules():
        with align_module_device(module):
            for name, weight in module.named_parameters(recurse=False):
                yield (f"{prefix}.{name}" if prefix else name), weight
