"""Vectors per second that each code encodes and decodes, beside TurboQuant's and KIVI's encoders.

    python examples/encode_throughput.py [--head-dim 128] [--n-vectors 65536] [--n-threads 1]
        [--fit-tokens 16384]

The torch encoders that every stage uses, on the CPU and on a GPU if there is one; in one run, at
the rates that stand beside each other. No rotation (TurboQuant and the polar codes need the same
one, KIVI none) and no packing: codes lie one per byte for every method. Median of several
repetitions after one warm-up; GB/s count the float32 vectors read or written.

On a GPU, rows "kernel, packed" are the CUDA encoder that a cache uses: half of the vectors as keys,
half as values, to the packed bytes of pages of 32 tokens, without a rotation and with its Hadamard
rotation. It has no decode column: attention decodes inside its own kernel (kernel_report.py).

--fit-tokens N also times the empirical fit of a SmolLM2-shaped model (30 layers, 3 KV heads,
head_dim 64) from N tokens: histograms of all angles, and the books of all layers, heads and levels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from sphkv_codebooks.comparators.coordinate_codebook import coordinate_codebook
from sphkv_codebooks.comparators.min_max import encode_min_max
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.search import SearchSpace, best_code
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.encode import encode
from sphkv_kernels.tier import TierFormat

N_REPETITIONS = 7
KIVI_GROUP = 32
PAGE_SIZE = 32


@dataclass(frozen=True)
class Codec:
    """encode: vectors to what is stored; decode: that back to vectors, None if it is not timed."""

    name: str
    rate: float
    encode: Callable[[torch.Tensor], object]
    decode: Callable[[object], torch.Tensor] | None


def polar(label: str, code: SphericalCode) -> Codec:
    return Codec(label, code.code_rate, code.encode, code.decode)  # type: ignore[arg-type]


def turboquant(bits: int, head_dim: int) -> Codec:
    """Norm, division, one Lloyd-Max book for every coordinate (arXiv 2504.19874, algorithm 1)."""
    book = coordinate_codebook(head_dim, bits)
    root_d = head_dim**0.5

    def encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return book.encode(x * (root_d / norms)), norms.to(torch.float16)

    def decode(stored: object) -> torch.Tensor:
        assert isinstance(stored, tuple)
        codes, norms = stored
        vectors: torch.Tensor = book.decode(codes, torch.float32) * (norms.float() / root_d)
        return vectors

    return Codec(f"TurboQuant-MSE {bits} bit", bits + 16 / head_dim, encode, decode)


def kivi(bits: int, kind: str) -> Codec:
    """Keys per channel over 32 tokens, values per token over 32 channels (arXiv 2402.02750)."""
    dim = 1 if kind == "keys" else -1

    def encode(x: torch.Tensor) -> object:
        shape = (-1, KIVI_GROUP, x.shape[-1]) if kind == "keys" else (len(x), -1, KIVI_GROUP)
        return encode_min_max(x.reshape(shape), bits, dim=dim)

    def decode(stored: object) -> torch.Tensor:
        vectors: torch.Tensor = stored.decode()  # type: ignore[attr-defined]
        return vectors

    return Codec(f"KIVI-{bits} {kind}", bits + 32 / KIVI_GROUP, encode, decode)


def kernel(label: str, code: SphericalCode, *, rotated: bool) -> Codec:
    """The CUDA encoder: keys and values to packed pages in one pass."""
    tier = TierFormat("code", "spherical", code, code)
    rotation = Rotation("hadamard", code.head_dim) if rotated else None

    def encode_pages(x: torch.Tensor) -> torch.Tensor:
        keys, values = x.reshape(2, -1, PAGE_SIZE, x.shape[-1])
        return encode(tier, keys, values, rotation=rotation, check=False)

    return Codec(label, code.code_rate, encode_pages, None)


def codecs(head_dim: int, *, has_kernel: bool) -> Iterator[tuple[str, list[Codec]]]:
    """Groups of codecs of about one rate; has_kernel: with the CUDA encoder."""

    def code(
        bits: tuple[int, ...], radius: str, **options: str
    ) -> SphericalCode:  # gain or pairing
        return SphericalCode.analytic("code", head_dim, bits, radius, **options)  # type: ignore[arg-type]

    def best(rate: float, **options: str) -> SphericalCode:
        return best_code(SearchSpace(head_dim, **options), rate).build("best")  # type: ignore[arg-type]

    def kernels(label: str, made: SphericalCode) -> list[Codec]:
        if not has_kernel:
            return []
        return [
            kernel(f"{label} kernel, packed", made, rotated=False),
            kernel("... and rotated", made, rotated=True),
        ]

    low, high = 3 + 16 / head_dim, 4 + 16 / head_dim
    yield (
        "about 3 bits",
        [
            polar("polar 4/2/2/2 r2", code((4, 2, 2, 2), "lloyd_max:2")),
            polar("... unbiased", code((4, 2, 2, 2), "lloyd_max:2", gain="unbiased")),
            polar("polar 3/2/2/2 r2", code((3, 2, 2, 2), "lloyd_max:2")),
            *kernels("4/2/2/2 r2", code((4, 2, 2, 2), "lloyd_max:2")),
            polar("best, whole bits", best(low, cells="powers_of_two")),
            polar("best, any cells", best(low)),
            turboquant(3, head_dim),
            kivi(2, "keys"),
            kivi(2, "values"),
        ],
    )
    yield (
        "about 4 bits",
        [
            polar("polar 4/2/2/2 fp16", code((4, 2, 2, 2), "fp16")),
            polar("polar 4/3/3/3 e5m6", code((4, 3, 3, 3), "minifloat:5,6")),
            polar("polar 5/3/3/3 r3", code((5, 3, 3, 3), "lloyd_max:3")),
            *kernels("5/3/3/3 r3", code((5, 3, 3, 3), "lloyd_max:3")),
            polar("best, any cells", best(high)),
            turboquant(4, head_dim),
            kivi(4, "keys"),
            kivi(4, "values"),
        ],
    )


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
    gigabytes = x.numel() * x.element_size() / 1e9
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{where}, head_dim {head_dim}, {n_vectors} vectors, {torch.get_num_threads()} threads")
    print(f"{'codec':<28}{'rate':>7}{'encode/s':>12}{'GB/s':>8}{'decode/s':>12}{'GB/s':>8}")
    for title, group in codecs(head_dim, has_kernel=device.type == "cuda"):
        print(title)
        for codec in group:
            stored = codec.encode(x)
            encode_s = median_s(lambda c=codec: c.encode(x), device)  # type: ignore[misc]
            line = f"  {codec.name:<26}{codec.rate:>7.3f}"
            line += f"{n_vectors / encode_s:>12.3g}{gigabytes / encode_s:>8.3f}"
            if codec.decode is None:
                print(f"{line}{'-':>12}{'-':>8}")
                continue
            decode_s = median_s(lambda d=codec.decode, s=stored: d(s), device)  # type: ignore[misc]
            print(f"{line}{n_vectors / decode_s:>12.3g}{gigabytes / decode_s:>8.3f}")


def measure_fit(n_tokens: int) -> None:
    """The empirical fit of a whole model, layers in parallel as fit-codebooks does it."""
    from sphkv_cli.artifacts.empirical_books import book_keys
    from sphkv_cli.fit.angle_statistics import count_angles
    from sphkv_cli.fit.angle_survey import VECTOR_KINDS
    from sphkv_cli.fit.empirical_fit import fit_layer_books
    from sphkv_cli.fit.layer_pool import each_layer

    n_layers, n_kv_heads, head_dim, chunk = 30, 3, 64, 4096
    generator = torch.Generator().manual_seed(42)
    x = torch.randn(n_tokens, n_kv_heads, head_dim, generator=generator)
    code = SphericalCode.analytic("full", head_dim, (4, 2, 2, 2, 2, 3), "norm")
    keys = book_keys((code,))

    def fit(_: int) -> int:
        histograms = {
            (kind, code.pairing): count_angles(torch.split(x, chunk), code.pairing)
            for kind in VECTOR_KINDS
        }
        return sum(len(books) for books in fit_layer_books(keys, histograms).values())

    start = time.perf_counter()
    n_books = sum(each_layer(fit, n_layers))
    print(
        f"empirical fit of {n_books} books ({n_layers} layers, {n_kv_heads} KV heads, keys and "
        f"values, {code.depth} levels) from {n_tokens} tokens: {time.perf_counter() - start:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--n-vectors", type=int, default=65536, help="a multiple of 64")
    parser.add_argument("--n-threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--fit-tokens", type=int, default=0)
    options = parser.parse_args()
    if options.n_vectors < 2 * PAGE_SIZE or options.n_vectors % (2 * PAGE_SIZE):
        parser.error(
            f"--n-vectors must be a multiple of {2 * PAGE_SIZE}: a page of keys and values"
        )
    if options.head_dim < KIVI_GROUP or options.head_dim & (options.head_dim - 1):
        parser.error("--head-dim must be a power of two, 32 or more")
    torch.set_num_threads(options.n_threads)
    measure(torch.device("cpu"), options.head_dim, options.n_vectors)
    if torch.cuda.is_available():
        measure(torch.device("cuda"), options.head_dim, options.n_vectors)
    else:
        print("no CUDA device: CPU only")
    if options.fit_tokens:
        measure_fit(options.fit_tokens)


if __name__ == "__main__":
    main()
