"""Configuration, tokenizer, skeleton and weights of a model, with transformers' errors in one line.

The skeleton is the model on torch's meta device: modules with shapes and no weights. It is enough
to refuse an architecture and to count bytes before anything large is read.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sphkv_cli.errors import EnvironmentUnable, SphkvError, UsageError
from sphkv_cli.models.source import ModelSource, missing_transformers

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadOptions:
    """How to run a model.

    `dtype` "auto" is the checkpoint's own on a GPU, float32 on a CPU (16-bit arithmetic is slow
    there). `device` "auto" is the first GPU if there is one. `device_map` hands placement to
    accelerate ("auto", "balanced", "sequential") and excludes `device`.
    """

    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype} is unknown", f"one of {', '.join(DTYPES)}")
        if self.device_map is not None and self.device != "auto":
            raise UsageError(
                f"--device-map {self.device_map} and --device {self.device} contradict each other",
                "pass one of them",
            )


def require_transformers() -> None:
    """Raise EnvironmentUnable, with the pip command, where transformers is not installed."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise missing_transformers() from error


def load_config(source: ModelSource) -> Any:
    """The model's configuration (transformers' own object)."""
    require_transformers()
    from transformers import AutoConfig

    with quiet_transformers(), _one_line(source):
        return AutoConfig.from_pretrained(source.location, **source.arguments)


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer."""
    require_transformers()
    from transformers import AutoTokenizer

    with quiet_transformers(), _one_line(source):
        return AutoTokenizer.from_pretrained(source.location, **source.arguments)


def skeleton(source: ModelSource, config: Any) -> Any:
    """The model without weights, on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), _one_line(source), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)


def load_model(source: ModelSource, options: LoadOptions) -> Any:
    """The model with its weights, in evaluation mode, without gradients.

    Raises:
        SphkvError: files are missing or damaged.
        EnvironmentUnable: the device does not exist here.
    """
    require_transformers()
    import torch
    from transformers import AutoModelForCausalLM

    device = None if options.device_map is not None else torch_device(options.device)
    on_cpu = device is not None and device.type == "cpu"
    dtype: Any = options.dtype
    if dtype == "auto" and on_cpu:
        dtype = torch.float32
    elif dtype != "auto":
        dtype = getattr(torch, dtype)
    with quiet_transformers(), _one_line(source):
        model = AutoModelForCausalLM.from_pretrained(
            source.location,
            dtype=dtype,
            device_map=options.device_map,
            **source.arguments,
        )
    if device is not None:
        model = model.to(device)
    return model.eval().requires_grad_(False)


def torch_device(name: str) -> Any:
    """The torch device called `name`; "auto" is the first CUDA device, or else the CPU."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"--device {name} is unknown", "for example cpu, cuda or cuda:1"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentUnable(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices",
            "pass --device cpu",
        )
    return device


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the terminal, and put them back."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _one_line(source: ModelSource) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if isinstance(error, SphkvError):
            raise
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        if "device_map as a string, the value needs" in str(error):
            raise UsageError(
                f"--device-map cannot be followed ({first[:200]})", "give auto, or leave it away"
            ) from error
        hint = "check the model's files"
        if "trust_remote_code" in str(error):
            hint = "pass --trust-remote-code if you trust its authors' Python"
        elif "does not recognize this architecture" in str(error):
            hint = "upgrade transformers, or choose another model"
        elif isinstance(error, ImportError) or "requires `accelerate`" in str(error):
            raise EnvironmentUnable(
                f"the model {source.name} cannot be loaded ({first[:200]})", "install what is named"
            ) from error
        raise SphkvError(
            f"the model {source.name} cannot be loaded ({first[:200]})", hint
        ) from error


def weight_of(module: Any) -> Any:
    """The weight of a linear module, fetched if accelerate has put it away."""
    if not module.weight.is_meta:
        return module.weight.detach()
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return module.weight.detach().clone()
