"""One benchmark case: the kernel against its reference, the memory ceilings and dense attention.

    speed-up = best bf16 latency of this run / kernel latency;  fraction = code bytes / time / rate

Everything is measured in one process on one GPU with a cold L2 (`timing`). Bytes are named terms.
The reconstruction baseline decodes the same codes to dense bf16 in memory and runs torch's
attention on them: what angle-domain attention avoids. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.decode import AttentionPlan, ada_decode, launch_params, plan
from sphkv_kernels.dense_attention import Baseline, fastest
from sphkv_kernels.launch import load_kernel
from sphkv_kernels.position_term import PositionTerm
from sphkv_kernels.reference import DecodeResult, ada_decode_reference
from sphkv_kernels.synthetic import tiled_cache
from sphkv_kernels.tier import PageError, TierFormat
from sphkv_kernels.timing import Latency, MemoryRates, measure
from sphkv_kernels.variant import Variant

TokenOrder = Literal["runs", "gaps", "spread"]


@dataclass(frozen=True)
class Shape:
    """A decode step: n_sequences x n_kv_heads x n_tokens x group_size."""

    n_sequences: int
    n_kv_heads: int
    n_tokens: int
    group_size: int
    head_dim: int = 128

    @property
    def name(self) -> str:
        return f"{self.n_sequences}x{self.n_kv_heads}x{self.n_tokens}x{self.group_size}"

    @property
    def dense_bytes(self) -> int:
        """bf16 keys and values."""
        return 4 * self.n_sequences * self.n_kv_heads * self.n_tokens * self.head_dim


@dataclass(frozen=True)
class CaseReport:
    """What one case measured; latencies in microseconds, rates in 10^9 bytes per second; the fields
    of fp8 are None where no fp8 attention ran."""

    shape: Shape
    tiers: tuple[str, ...]
    page_size: int
    bits_per_coordinate: float
    bytes_read: dict[str, int]
    latency: Latency
    code_gb_per_s: float
    fraction_of_read_rate: float
    fraction_of_copy_rate: float
    best_bf16: str
    best_bf16_us: float
    speed_up: float
    best_fp8: str | None
    best_fp8_us: float | None
    speed_up_over_fp8: float | None
    reconstruct: Latency | None
    output_error: float
    log_sum_exp_error: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def uniform_pages(shape: Shape, page_size: int, tier: int = 0) -> torch.Tensor:
    """Every page of one tier."""
    n_pages = -(-shape.n_tokens // page_size)
    return torch.full((shape.n_sequences, shape.n_kv_heads, n_pages), tier, dtype=torch.int64)


def run_case(
    tiers: tuple[TierFormat, ...],
    shape: Shape,
    rates: MemoryRates,
    baselines: Sequence[Baseline],
    *,
    page_size: int = 32,
    page_tiers: torch.Tensor | None = None,
    with_reconstruction: bool = False,
    n_samples: int = 50,
    seed: int = 42,
) -> CaseReport:
    """Time one decode step over a synthetic cache and check the kernel on the same tiers.

    page_tiers: (n_sequences, n_kv_heads, n_pages) tier of every page, -1 dropped; all tier 0 by
    default.

    Raises:
        RuntimeError: no baseline attends to dense bf16 keys.
        PageError: as `plan`, and as `time_reconstruction` with_reconstruction.
    """
    best, best_fp8 = fastest(baselines, "bf16"), fastest(baselines, "fp8")
    if best is None:
        raise RuntimeError(f"no attention on dense bf16 keys ran {shape.name}")
    if page_tiers is None:
        page_tiers = uniform_pages(shape, page_size)
    cache = tiled_cache(tiers, page_tiers, page_size, shape.n_kv_heads, shape.head_dim, seed=seed)
    attention_plan, query, step = _decode_step(cache, shape.group_size, seed)
    latency = measure(step, n_samples=n_samples)
    work = attention_plan.work
    n_heads = shape.n_sequences * shape.n_kv_heads * shape.group_size
    bytes_read = {
        "codes": work.code_bytes,
        "plan": work.n_bytes,
        "query": query.numel() * query.element_size(),
        "partial_results": 2 * work.n_parts * shape.group_size * (shape.head_dim + 2) * 4,
        "output": n_heads * (shape.head_dim + 1) * 4,
    }
    reconstruct = None
    if with_reconstruction:
        reconstruct = time_reconstruction(attention_plan, query, n_samples=n_samples // 2)
    output_error, lse_error = check_tiers(tiers, shape, page_size, seed)
    fp8_us = None if best_fp8 is None else best_fp8.median_us
    code_rate = work.code_bytes / latency.median_us / 1e3
    n_coordinates = 2 * shape.n_sequences * shape.n_kv_heads * shape.n_tokens * shape.head_dim
    return CaseReport(
        shape=shape,
        tiers=tuple(tier.name for tier in tiers),
        page_size=page_size,
        bits_per_coordinate=8 * work.code_bytes / n_coordinates,
        bytes_read=bytes_read,
        latency=latency,
        code_gb_per_s=code_rate,
        fraction_of_read_rate=code_rate / rates.read_gb_per_s,
        fraction_of_copy_rate=code_rate / rates.copy_gb_per_s,
        best_bf16=best.name,
        best_bf16_us=best.median_us,
        speed_up=best.median_us / latency.median_us,
        best_fp8=None if best_fp8 is None else best_fp8.name,
        best_fp8_us=fp8_us,
        speed_up_over_fp8=None if fp8_us is None else fp8_us / latency.median_us,
        reconstruct=reconstruct,
        output_error=output_error,
        log_sum_exp_error=lse_error,
    )


def uniform_case(tier: TierFormat, shape: Shape, seed: int, *, page_size: int = 32) -> Latency:
    """Time one decode step over pages of one tier, and nothing else."""
    cache = _uniform_cache(tier, shape, page_size, seed)
    _, _, step = _decode_step(cache, shape.group_size, seed)
    return measure(step)


@dataclass(frozen=True)
class MetadataCase:
    """What is read beside codes: bytes of named terms; with_term: the step with a position term of
    `n_pairs` RoPE pairs; order: of the tokens (`with_positions`), which says what it reads of
    their positions."""

    tier: str
    shape: Shape
    page_size: int
    n_pairs: int
    order: TokenOrder
    n_bytes: dict[str, int]
    latency: Latency
    with_term: Latency


def metadata_case(
    tier: TierFormat,
    shape: Shape,
    page_size: int,
    n_pairs: int,
    seed: int,
    *,
    order: TokenOrder = "runs",
) -> MetadataCase:
    """Time one shape and page size, without and with positions (uint16 where they fit)."""
    cache = _uniform_cache(tier, shape, page_size, seed)
    cache = with_positions(cache, shape.n_tokens, order, seed)
    attention_plan, _, step = _decode_step(cache, shape.group_size, seed)
    term = random_term(cache, shape.group_size, n_pairs, seed)
    n_vectors = 2 * cache.page_table.n_entries * page_size
    has_norm = [
        isinstance(region, SphericalCode) and region.radius_coding.norm_bits > 0
        for region in (tier.key_format, tier.value_format)
    ]
    norms = n_vectors // 2 * 2 * sum(has_norm)
    n_bytes = {
        "codes": attention_plan.work.code_bytes - norms,
        "norms": norms,
        "plan": attention_plan.work.n_bytes,
        "positions": attention_plan.position_bytes,
    }
    plain, with_term = measure(step), measure(lambda: step(term))
    return MetadataCase(tier.name, shape, page_size, n_pairs, order, n_bytes, plain, with_term)


def with_positions(
    cache: PagedCache, n_tokens: int, order: TokenOrder = "runs", seed: int = 0
) -> PagedCache:
    """A synthetic cache of uniform pages whose tokens follow one another; "gaps": every eighth
    position has none; "spread": in an order drawn at random, so that a page spans the context."""
    entries = torch.arange(cache.page_table.n_entries, device=cache.device)
    rows = torch.arange(cache.page_size, device=cache.device)
    positions = (entries[:, None] * cache.page_size + rows) % n_tokens
    if order == "gaps":
        positions += positions // 7
    if order == "spread":
        drawn = torch.randperm(n_tokens, generator=torch.Generator().manual_seed(seed))
        positions = drawn.to(cache.device)[positions]
    dtype = torch.uint16 if int(positions.max()) < 1 << 16 else torch.int32
    return replace(cache, positions=positions.to(dtype))


def random_term(cache: PagedCache, group_size: int, n_pairs: int, seed: int) -> PositionTerm:
    """Coefficients of size one and frequencies between 0 and 1."""
    generator = torch.Generator(device=cache.device).manual_seed(seed)
    shape = (cache.n_sequences, cache.n_kv_heads * group_size, 2, n_pairs)
    return PositionTerm(
        torch.randn(shape, generator=generator, device=cache.device),
        torch.rand((cache.n_kv_heads, n_pairs), generator=generator, device=cache.device),
    )


def check_tiers(
    tiers: tuple[TierFormat, ...], shape: Shape, page_size: int, seed: int, n_pages: int = 48
) -> tuple[float, float]:
    """(relative output error, log-sum-exp error) against the float64 reference, same run and GPU.

    On a cache of the same tiers, heads and group with n_pages pages a head, the last one partial.
    """
    n_kv_heads = min(shape.n_kv_heads, 4)
    pages = torch.arange(2 * n_kv_heads * n_pages).view(2, n_kv_heads, n_pages) % len(tiers)
    cache = tiled_cache(
        tiers, pages, page_size, n_kv_heads, shape.head_dim, seed=seed, n_distinct=32
    )
    live = cache.page_table.live_tokens.clone()
    live[n_pages - 1 :: n_pages] = page_size - 3
    cache = replace(cache, page_table=replace(cache.page_table, live_tokens=live))
    query = _query(cache, shape.group_size, seed)
    scale = shape.head_dim**-0.5
    expected = ada_decode_reference(query, cache, scale)
    result = ada_decode(query, cache, scale)
    error = (result.output.double() - expected.output).norm(dim=-1) / expected.output.norm(dim=-1)
    lse_error = (result.log_sum_exp.double() - expected.log_sum_exp).abs()
    return float(error.max()), float(lse_error.max())


def time_reconstruction(
    attention_plan: AttentionPlan, query: torch.Tensor, *, n_samples: int
) -> Latency:
    """Decoding to dense bf16, then torch's fastest attention backend (cuDNN) on it.

    Raises:
        PageError: pages of more than one tier, of a tier that is not spherical, or partial ones.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    cache, used = attention_plan.cache, attention_plan.work.used_tiers
    is_full = cache.page_table.live_tokens == cache.page_size
    if len(used) != 1 or not bool(is_full.all()):
        raise PageError("a reconstruction is timed on full pages of one tier")
    variant = Variant((cache.tiers[used[0]],), cache.head_dim, 1, reconstruct=True)
    kernel = load_kernel(variant, cache.device)
    entries = cache.page_table.n_entries
    rows = (entries * cache.page_size, cache.head_dim)
    keys = torch.empty(rows, dtype=torch.bfloat16, device=cache.device)
    values = torch.empty_like(keys)
    params = launch_params(query, attention_plan, None, 0, None)
    params.logits, params.tail_logits = keys.data_ptr(), values.data_ptr()
    shape = (cache.n_sequences, cache.n_kv_heads, -1, cache.head_dim)
    dense_query = query.to(torch.bfloat16)[:, :, None]

    def step() -> None:
        kernel.launch(attention_plan.work.n_blocks, params)
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            scaled_dot_product_attention(
                dense_query, keys.view(shape), values.view(shape), enable_gqa=True
            )

    return measure(step, n_samples=n_samples)


def retention_pages(shape: Shape, page_size: int, n_tiers: int, seed: int = 42) -> torch.Tensor:
    """Page tiers like those of a retention policy: heads keep 1/30 to all of their pages, and split
    what they keep over the tiers in shares of their own; the rest is dropped (-1)."""
    generator = torch.Generator().manual_seed(seed)
    n_pages = -(-shape.n_tokens // page_size)
    pages = torch.full((shape.n_sequences, shape.n_kv_heads, n_pages), -1, dtype=torch.int64)
    n_heads = shape.n_sequences * shape.n_kv_heads
    kept = torch.exp(torch.linspace(math.log(1 / 30), 0.0, n_heads))
    for index in range(n_heads):
        n_kept = max(1, round(float(kept[index]) * n_pages))
        shares = torch.rand(n_tiers, generator=generator) + 0.05
        row = torch.multinomial(shares, n_kept, replacement=True, generator=generator)
        pages.view(n_heads, n_pages)[index, :n_kept] = row
    return pages


def _uniform_cache(tier: TierFormat, shape: Shape, page_size: int, seed: int) -> PagedCache:
    pages = uniform_pages(shape, page_size)
    return tiled_cache((tier,), pages, page_size, shape.n_kv_heads, shape.head_dim, seed=seed)


def _decode_step(
    cache: PagedCache, group_size: int, seed: int
) -> tuple[AttentionPlan, torch.Tensor, Callable[..., DecodeResult]]:
    """The plan of a cache, a random query, and the step over them, with a position term if given
    one."""
    attention_plan = plan(cache, group_size, check=False)
    query = _query(cache, group_size, seed)
    scale = cache.head_dim**-0.5

    def step(term: PositionTerm | None = None) -> DecodeResult:
        return ada_decode(query, cache, scale, position_term=term, plan=attention_plan)

    return attention_plan, query, step


def _query(cache: PagedCache, group_size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator(device=cache.device).manual_seed(seed)
    shape = (cache.n_sequences, cache.n_kv_heads * group_size, cache.head_dim)
    return torch.randn(shape, generator=generator, device=cache.device)
