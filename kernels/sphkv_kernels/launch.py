"""Loading a cubin and launching it: the CUDA driver, one parameter struct, no copies.

Launches go to torch's current stream, so that they order with torch's own work and are captured by
a CUDA graph.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sphkv_kernels.build import compile_cubin
from sphkv_kernels.kernel_structs import KernelParams
from sphkv_kernels.tier import PageError
from sphkv_kernels.variant import SHARED_BYTES, KernelSource, Variant, kernel_source


class KernelLaunchError(RuntimeError):
    """The driver refused to load or launch a kernel; the message holds its status."""


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel of one variant on one device, ready to launch."""

    source: KernelSource
    tables: Tensor
    function: Any

    def launch(self, n_blocks: int, params: KernelParams) -> None:
        """Enqueue one launch on torch's current stream of this device, with the variant's tables.

        Raises:
            KernelLaunchError: the driver refuses.
        """
        source = self.source
        params.tables = self.tables.data_ptr()
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
    """Enqueue a kernel whose one argument is a struct, on torch's current stream of `device`.

    Raises:
        KernelLaunchError: the driver refuses.
    """
    from cuda.bindings import driver

    # The driver launches in the current context, and a stream of number 0 is that context's own.
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch_function(function, grid, n_threads, shared_bytes, device, params)
        return
    stream = torch.cuda.current_stream(device).cuda_stream
    argument = (ctypes.c_void_p * 1)(ctypes.addressof(params))

    def launch() -> Any:
        (status,) = driver.cuLaunchKernel(
            function, *grid, 1, n_threads, 1, 1, shared_bytes, stream, ctypes.addressof(argument), 0
        )
        return status

    status = launch()
    if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
        # A thread in which torch has not met the device yet: memory that torch has cached needs no
        # call of the runtime, which would have made the context current.
        _make_context_current(device)
        status = launch()
    require_success(status, "cuLaunchKernel")


def _make_context_current(device: torch.device) -> None:
    """Torch's context of `device`, the current device, in this thread."""
    torch.cuda.current_stream(device).synchronize()


def capability_of(device: torch.device) -> int:
    """Compute capability as an integer (90 for sm_90).

    Raises:
        PageError: one that the kernels are not built for.
    """
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    if capability not in SHARED_BYTES:
        raise PageError(
            f"{device} has compute capability {major}.{minor}: the CUDA kernels are built for "
            f"{sorted(SHARED_BYTES)}; use the reference backend"
        )
    return capability


def with_index(device: torch.device) -> torch.device:
    """The device that "cuda" stands for now."""
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def tables_fit(variant: Variant, device: torch.device) -> bool:
    """Whether the variant's query tables fit into this device's shared memory beside the others."""
    try:
        kernel_source(variant, capability_of(device))
    except PageError:
        return False
    return True


def load_kernel(variant: Variant, device: torch.device) -> LoadedKernel:
    """Compile (or find) and load a variant; kept for the life of the process.

    Raises:
        PageError: a device that no kernel is built for, or tables too large for it.
        KernelBuildError, KernelLaunchError: as `load_function`.
    """
    return _load(_VariantKey(variant), with_index(device))


class _VariantKey:
    """Hash of a variant by the content of its codes (tiers hold arrays)."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        tiers = tuple(tier.content for tier in variant.tiers)
        others = (getattr(variant, one.name) for one in fields(variant) if one.name != "tiers")
        self.key = (tiers, *others)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _VariantKey) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@cache
def _load(key: _VariantKey, device: torch.device) -> LoadedKernel:
    capability = capability_of(device)
    source = kernel_source(key.variant, capability)
    # Also where the kernel is there: the tables of its codes are copied to the device below.
    _refuse_in_capture(source.kernel_name)
    function = load_function(
        source.text, source.kernel_name, source.shared_bytes, capability, device
    )
    tables = torch.from_numpy(source.table_rows.copy()).to(device)
    return LoadedKernel(source, tables, function)


@cache
def load_function(
    text: str, name: str, shared_bytes: int, capability: int, device: torch.device
) -> Any:
    """Compile (or find) a CUDA source and load its kernel `name` into torch's context.

    Loaded once and kept for the life of the process: CUDA graphs hold it.

    Raises:
        KernelBuildError: NVRTC is missing or refuses the source.
        KernelLaunchError: the driver refuses the cubin, or a CUDA graph is being captured.
    """
    from cuda.bindings import driver

    _refuse_in_capture(name)
    cubin = compile_cubin(text, capability)
    with torch.cuda.device(device):
        _make_context_current(device)
        status, module = driver.cuModuleLoadData(cubin)
        require_success(status, "cuModuleLoadData")
        status, function = driver.cuModuleGetFunction(module, name.encode())
        require_success(status, "cuModuleGetFunction")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuFuncSetAttribute(function, attribute, shared_bytes)
        require_success(status, "cuFuncSetAttribute")
    return function


def _refuse_in_capture(name: str) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise KernelLaunchError(
            f"the kernel {name} is not loaded, and cannot be while a CUDA graph is captured: run "
            "the same step once before"
        )


def require_success(status: Any, what: str) -> None:
    """Raise KernelLaunchError where a call of the driver failed."""
    if int(status) != 0:
        raise KernelLaunchError(f"{what} failed: {status!r}")
