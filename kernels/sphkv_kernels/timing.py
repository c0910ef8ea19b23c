"""Times one can trust: cold L2, CUDA graphs, events, and the ceilings of the same run.

    latency = median over replays of (end event - start event), each after a flush of L2
    copy rate = 2 bytes / time of a device copy;  read rate = bytes / time of a kernel that reads

Every function here runs on torch's current device and stream. The flush reads a buffer several
times the size of L2, so that the timed work starts with an L2 full of clean, foreign lines.
Source: ours; flush and graphs after FlashInfer's and Triton's benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sphkv_kernels.launch import capability_of, load_function, require_success

FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Latency:
    """Microseconds over `n_samples` cold replays."""

    median_us: float
    p20_us: float
    p80_us: float
    n_samples: int


@dataclass(frozen=True)
class MemoryRates:
    """Ceilings of this run, in 10^9 bytes per second."""

    copy_gb_per_s: float
    read_gb_per_s: float


def measure(step: Callable[[], object], *, n_samples: int = 50, warm_up: int = 3) -> Latency:
    """Latency of `step`, captured once into a CUDA graph and replayed with a cold L2."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    starts, ends = _events(n_samples), _events(n_samples)
    graph.replay()
    for start, end in zip(starts, ends, strict=True):
        read_bytes(flush, sink)
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = [1e3 * a.elapsed_time(b) for a, b in zip(starts, ends, strict=True)]
    median, p20, p80 = np.quantile(times, [0.5, 0.2, 0.8]).tolist()
    return Latency(median, p20, p80, n_samples)


def _events(n: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(n)]  # type: ignore[no-untyped-call]


def memory_rates(n_bytes: int = 1 << 30) -> MemoryRates:
    """Copy and read rate over buffers of `n_bytes`, measured like everything else."""
    source = torch.randint(0, 255, (n_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    copy = measure(lambda: target.copy_(source), n_samples=20)
    read = measure(lambda: read_bytes(source, sink), n_samples=20)
    return MemoryRates(2e-3 * n_bytes / copy.median_us, 1e-3 * n_bytes / read.median_us)


def read_bytes(buffer: Tensor, sink: Tensor) -> None:
    """Read a whole buffer (a multiple of 16 bytes) once."""
    import ctypes

    from cuda.bindings import driver

    index = torch.cuda.current_device()
    function, n_blocks = _read_kernel(index)
    values = (
        ctypes.c_void_p(buffer.data_ptr()),
        ctypes.c_ulonglong(buffer.numel() * buffer.element_size() // 16),
        ctypes.c_void_p(sink.data_ptr()),
    )
    arguments = (ctypes.c_void_p * 3)(*(ctypes.addressof(value) for value in values))
    (status,) = driver.cuLaunchKernel(
        function, n_blocks, 1, 1, 512, 1, 1, 0,
        torch.cuda.current_stream().cuda_stream, ctypes.addressof(arguments), 0,
    )  # fmt: skip
    require_success(status, "cuLaunchKernel")


@lru_cache
def _read_kernel(index: int) -> tuple[Any, int]:
    device = torch.device("cuda", index)
    source = (Path(__file__).parent / "cuda" / "read.cu").read_text()
    function = load_function(source, "read_all", 0, capability_of(device), device)
    return function, 4 * torch.cuda.get_device_properties(index).multi_processor_count


def device_provenance() -> dict[str, Any]:
    """GPU, clocks, driver and versions, as a report keeps them."""
    import subprocess

    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        line = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout.strip().splitlines()[0]  # fmt: skip
        smi = dict(zip(fields.split(","), (x.strip() for x in line.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        smi = {"nvidia-smi": f"not available: {error}"}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "n_multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "smi": smi,
    }
