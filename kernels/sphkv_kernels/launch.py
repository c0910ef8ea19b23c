"""Loading a cubin and launching it: the CUDA driver, one parameter struct, no copies.

The struct mirrors `cuda/params.cuh` field by field. Launches go to torch's current stream, so that
they order with torch's own work and are captured by a CUDA graph.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sphkv_kernels.build import KernelBuildError, compile_cubin
from sphkv_kernels.tier import PageError
from sphkv_kernels.variant import KernelSource, Variant, kernel_source

_POINTERS = (
    "pool", "records", "entries", "first_positions", "position_offsets", "heads", "segments",
    "tables", "query", "offset", "tail_keys", "tail_values", "tail_tokens", "positions",
    "tail_positions", "query_positions", "position_coefficients", "position_frequencies",
    "output", "log_sum_exp", "logits", "tail_logits", "partial_output", "partial_state", "arrivals",
)  # fmt: skip
_FLOATS = ("scale_log2", "softcap_log2", "softcap_inverse")
_INTS = (
    "n_kv_heads", "group_size", "page_units_log2", "tail_capacity", "query_type", "window",
    "n_position_pairs",
)  # fmt: skip


class KernelParams(ctypes.Structure):
    """`Params` of params.cuh."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in _POINTERS]
        + [(name, ctypes.c_float) for name in _FLOATS]
        + [(name, ctypes.c_int) for name in _INTS]
    )


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel of one variant on one device, ready to launch."""

    source: KernelSource
    tables: Tensor
    function: Any
    n_multiprocessors: int

    def launch(self, n_blocks: int, params: KernelParams) -> None:
        """Enqueue one launch on torch's current stream of this device."""
        source = self.source
        launch_function(
            self.function, (n_blocks, 1), source.n_threads, source.shared_bytes,
            self.tables.device, params,
        )  # fmt: skip


def launch_function(
    function: Any,
    grid: tuple[int, int],
    n_threads: int,
    shared_bytes: int,
    device: torch.device,
    params: ctypes.Structure,
) -> None:
    """Enqueue a kernel whose one argument is a struct, on torch's current stream of `device`."""
    from cuda.bindings import driver

    stream = torch.cuda.current_stream(device).cuda_stream
    argument = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    (status,) = driver.cuLaunchKernel(
        function, *grid, 1, n_threads, 1, 1, shared_bytes, stream, ctypes.addressof(argument), 0
    )
    _check(status, "cuLaunchKernel")


def capability_of(device: torch.device) -> int:
    """Compute capability as an integer (90 for sm_90)."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tables_fit(variant: Variant, device: torch.device) -> bool:
    """Whether the variant's query tables fit into this device's shared memory beside the others."""
    try:
        kernel_source(variant, capability_of(device))
    except PageError:
        return False
    return True


def load_kernel(variant: Variant, device: torch.device) -> LoadedKernel:
    """Compile (or find) and load a variant; kept for the life of the process."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _load(_VariantKey(variant), index)


class _VariantKey:
    """Hash of a variant by the content of its codes (tiers hold arrays)."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        tiers = tuple(
            (
                tier.kind,
                None if tier.key_code is None else tier.key_code.digest,
                None if tier.value_code is None else tier.value_code.digest,
            )
            for tier in variant.tiers
        )
        others = (getattr(variant, one.name) for one in fields(variant) if one.name != "tiers")
        self.key = (tiers, *others)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _VariantKey) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@lru_cache(maxsize=256)
def _load(key: _VariantKey, index: int) -> LoadedKernel:
    device = torch.device("cuda", index)
    capability = capability_of(device)
    source = kernel_source(key.variant, capability)
    function = load_function(
        source.text, source.kernel_name, source.shared_bytes, capability, device
    )
    tables = torch.from_numpy(source.table_rows.copy()).to(device)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return LoadedKernel(source, tables, function, count)


def load_function(
    text: str, name: str, shared_bytes: int, capability: int, device: torch.device
) -> Any:
    """Compile (or find) a CUDA source and load its kernel `name` into torch's context."""
    from cuda.bindings import driver

    cubin = compile_cubin(text, capability)
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # torch's context is current from here on
        status, module = driver.cuModuleLoadData(cubin)
        _check(status, "cuModuleLoadData")
        status, function = driver.cuModuleGetFunction(module, name.encode())
        _check(status, "cuModuleGetFunction")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuFuncSetAttribute(function, attribute, shared_bytes)
        _check(status, "cuFuncSetAttribute")
    return function


def _check(status: Any, what: str) -> None:
    if int(status) != 0:
        raise KernelBuildError(f"{what} failed: {status!r}")
