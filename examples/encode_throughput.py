"""Vectors per second that each code encodes and decodes, on the CPU and on a GPU if there is one.

    python examples/encode_throughput.py [--head-dim 128] [--n-vectors 65536] [--n-threads 1]

The torch encoder that every stage uses (not the CUDA kernel's own), rotation not included. Median
of several repetitions after one warm-up; GB/s count the float32 vectors read or written.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from sphkv_codebooks.spherical_code import SphericalCode

N_REPETITIONS = 7


def codes(head_dim: int) -> list[SphericalCode]:
    """The paper's code, two cheaper ones, the kernel's 64-bit block, and full depth."""
    full_depth = (4, *[2] * (head_dim.bit_length() - 2))
    return [
        SphericalCode.analytic("4/2/2/2 fp16", head_dim),
        SphericalCode.analytic("3/1/1/1 r1", head_dim, (3, 1, 1, 1), "lloyd_max:1"),
        SphericalCode.analytic("4/2/2/2 r2", head_dim, radius="lloyd_max:2"),
        SphericalCode.analytic("4/3/3/3 e5m6", head_dim, (4, 3, 3, 3), "minifloat:5,6"),
        SphericalCode.analytic("5/3/3/3 r3", head_dim, (5, 3, 3, 3), "lloyd_max:3"),
        SphericalCode.analytic("4/2/.. full depth", head_dim, full_depth, "norm"),
        SphericalCode.analytic(
            "4/2/2/2 r2, unbiased", head_dim, radius="lloyd_max:2", gain="unbiased"
        ),
    ]


def median_s(action: Callable[[], object], device: torch.device) -> float:
    """Median seconds of one call, the device idle before and after."""
    times_s = []
    for repetition in range(N_REPETITIONS + 1):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repetition:
            times_s.append(time.perf_counter() - start)
    return statistics.median(times_s)


def measure(device: torch.device, head_dim: int, n_vectors: int) -> None:
    generator = torch.Generator().manual_seed(42)
    x = torch.randn(n_vectors, head_dim, generator=generator).to(device)
    megabytes = x.numel() * x.element_size() / 1e6
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{where}, head_dim {head_dim}, {n_vectors} vectors, {torch.get_num_threads()} threads")
    print(f"{'code':<22}{'rate':>7}{'encode/s':>12}{'GB/s':>8}{'decode/s':>12}{'GB/s':>8}")
    for code in codes(head_dim):
        encoded = code.encode(x)
        encode_s = median_s(lambda c=code: c.encode(x), device)  # type: ignore[misc]
        decode_s = median_s(lambda c=code, e=encoded: c.decode(e), device)  # type: ignore[misc]
        print(
            f"{code.name:<22}{code.code_rate:>7.3f}"
            f"{n_vectors / encode_s:>12.3g}{megabytes / 1e3 / encode_s:>8.3f}"
            f"{n_vectors / decode_s:>12.3g}{megabytes / 1e3 / decode_s:>8.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--n-vectors", type=int, default=65536)
    parser.add_argument("--n-threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.n_threads)
    measure(torch.device("cpu"), options.head_dim, options.n_vectors)
    if torch.cuda.is_available():
        measure(torch.device("cuda"), options.head_dim, options.n_vectors)
    else:
        print("no CUDA device: CPU only")


if __name__ == "__main__":
    main()
