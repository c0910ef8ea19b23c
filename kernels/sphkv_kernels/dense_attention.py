"""Decode attention on dense keys and values: what the kernel is compared with.

    torch's backends, each pinned, on bf16; where FlashInfer is installed, its paged decode on bf16
    and on fp8 e4m3, by its CUDA-core kernel and by the tensor cores (its FlashAttention-2 form)

FlashInfer builds its kernels with nvcc when they are first asked for (a minute or more) and keeps
them in its own cache.  A kernel that refuses a shape, or cannot be built, says why.
Source: FlashInfer (arXiv 2501.01005).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sphkv_kernels.timing import Latency, measure

FLASHINFER_PAGE_SIZE = 16
_WORKSPACE_BYTES = 256 << 20

KVFormat = Literal["bf16", "fp8"]


@dataclass(frozen=True)
class Baseline:
    """Attention on dense keys and values of one shape; latency None where `reason` says why."""

    name: str
    kv_format: KVFormat
    latency: Latency | None
    reason: str = ""

    @property
    def median_us(self) -> float:
        """Of a baseline that ran; infinite of another."""
        return float("inf") if self.latency is None else self.latency.median_us


def dense_baselines(
    n_sequences: int,
    n_kv_heads: int,
    n_tokens: int,
    group_size: int,
    head_dim: int,
    *,
    n_samples: int = 30,
) -> tuple[Baseline, ...]:
    """Every baseline at one shape: one query token a sequence, bf16 queries, Gaussian data."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    query = gaussian(n_sequences, n_kv_heads * group_size, head_dim)
    found = []
    keys, values = (gaussian(n_sequences, n_kv_heads, n_tokens, head_dim) for _ in range(2))
    for name, step in _sdpa_steps(query, keys, values):
        found.append(_timed(name, "bf16", step, n_samples))
    if has_flashinfer():
        # As pages of other data: which token lies where does not change the time.
        n_pages = -(-n_tokens // FLASHINFER_PAGE_SIZE)
        del step, keys, values  # the step holds them too
        pages = (n_sequences * n_pages, FLASHINFER_PAGE_SIZE, n_kv_heads, head_dim)
        try:
            keys, values = gaussian(*pages), gaussian(*pages)
            found += _flashinfer_baselines(query, keys, values, n_tokens, "bf16", n_samples)
            keys = keys.to(torch.float8_e4m3fn)
            values = values.to(torch.float8_e4m3fn)
            found += _flashinfer_baselines(query, keys, values, n_tokens, "fp8", n_samples)
        except torch.OutOfMemoryError:
            reason = "FlashInfer's pages do not fit into this GPU's memory"
            found.append(Baseline("flashinfer fp8", "fp8", None, reason))
    return tuple(found)


def fastest(baselines: Sequence[Baseline], kv_format: KVFormat) -> Baseline | None:
    """The fastest baseline of a format that ran; None where none did."""
    ran = [b for b in baselines if b.kv_format == kv_format and b.latency is not None]
    return min(ran, key=lambda b: b.median_us, default=None)


def fp8_sentence(baselines: Sequence[Baseline]) -> str:
    """Which fp8 attention the speed-ups over fp8 mean, or why there are none."""
    asked = [b for b in baselines if b.kv_format == "fp8"]
    if not asked:
        return "No fp8 baseline: FlashInfer is not installed here."
    if fastest(asked, "fp8") is None:
        return f"No fp8 baseline: {asked[0].reason}"
    return (
        "fp8 is FlashInfer's paged decode, by its CUDA cores or tensor cores, whichever is faster."
    )


def has_flashinfer() -> bool:
    """Whether FlashInfer is installed."""
    return importlib.util.find_spec("flashinfer") is not None


def _sdpa_steps(
    query: Tensor, keys: Tensor, values: Tensor
) -> Iterator[tuple[str, Callable[[], object]]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def step_of(backend: Any) -> Callable[[], object]:
        def step() -> Tensor:
            with sdpa_kernel([backend]):
                return scaled_dot_product_attention(
                    query[:, :, None], keys, values, enable_gqa=True
                )

        return step

    for backend in (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ):
        yield f"sdpa {backend.name.removesuffix('_ATTENTION').lower()}", step_of(backend)


def _timed(name: str, kv_format: KVFormat, step: Callable[[], object], n_samples: int) -> Baseline:
    try:
        with warnings.catch_warnings():
            # A backend that refuses says so in warnings and in the error below.
            warnings.simplefilter("ignore", UserWarning)
            return Baseline(name, kv_format, measure(step, n_samples=n_samples))
    except RuntimeError as error:  # torch's way to say that a backend does not take this shape
        torch.cuda.synchronize()
        return Baseline(name, kv_format, None, str(error).splitlines()[0])


def flashinfer_step(
    query: Tensor, keys: Tensor, values: Tensor, n_tokens: int, *, tensor_cores: bool
) -> Callable[[], Tensor]:
    """One planned decode step of FlashInfer, over pages that lie in order.

    query, and the result of the step: (n_sequences, n_q_heads, head_dim) bf16; keys, values:
    (n_sequences x pages of one sequence, page_size, n_kv_heads, head_dim) bf16 or fp8.

    Raises:
        RuntimeError, ValueError: a shape that FlashInfer refuses, or a kernel that it cannot build.
    """
    import flashinfer

    n_sequences, n_q_heads, head_dim = query.shape
    page_size, n_kv_heads = keys.shape[1:3]
    n_pages = len(keys) // n_sequences
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=tensor_cores, backend="fa2"
    )
    wrapper.plan(
        n_pages * torch.arange(n_sequences + 1, dtype=torch.int32),
        torch.arange(len(keys), dtype=torch.int32, device=query.device),
        torch.full((n_sequences,), n_tokens - (n_pages - 1) * page_size, dtype=torch.int32),
        n_q_heads,
        n_kv_heads,
        head_dim,
        page_size,
        q_data_type=query.dtype,
        kv_data_type=keys.dtype,
    )
    return lambda: wrapper.run(query, (keys, values))


def _flashinfer_baselines(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    n_tokens: int,
    kv_format: KVFormat,
    n_samples: int,
) -> list[Baseline]:
    found = []
    for tensor_cores in (False, True):
        name = f"flashinfer {kv_format}{', tensor cores' if tensor_cores else ''}"
        try:
            step = flashinfer_step(query, keys, values, n_tokens, tensor_cores=tensor_cores)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            found.append(Baseline(name, kv_format, None, reason))
            continue
        found.append(_timed(name, kv_format, step, n_samples))
    return found
