"""A digest that tells models apart without reading every weight.

SHA-256 over the configuration (less what does not change the function) and, for every parameter in
the order of names, its shape and 64 evenly spaced weights rounded to bfloat16. The rounding makes
the digest the same whether a checkpoint is run in bfloat16 or in float32.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

_SAMPLES = 64
# Names, versions and ways of running: the function computed stays the same.
_NOT_THE_MODEL = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path",
        "_attn_implementation_autoset",
        "attn_implementation",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "quantization_config",
    }
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
    """The configuration as JSON, without what does not change the function computed."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if k not in _NOT_THE_MODEL}
        return value

    return json.dumps(clean(config.to_dict()), sort_keys=True, default=str)


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
