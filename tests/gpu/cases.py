"""Caches, queries and comparisons of the GPU tests: kernel against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sphkv_kernels.cache import PagedCache
from sphkv_kernels.cache_builder import build_cache
from sphkv_kernels.decode import AttentionPlan, ada_decode, plan
from sphkv_kernels.page_slots import SequenceTokens
from sphkv_kernels.reference import DecodeResult, ada_decode_reference, ada_logits_reference
from sphkv_kernels.tier import TierFormat
from tests.kernels.cases import native_tiers, random_tokens

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the kernel cannot run here"
)
OUTPUT_TOLERANCE = 2e-3  # relative; fp16 fragments round every factor to 11 bits
LSE_TOLERANCE = 1e-3  # times max(1, largest |logit| / 10): a logit's error grows with it
RAGGED = (1, 15, 16, 17, 63, 65, 300)


def tier_set(head_dim: int, *indices: int) -> tuple[TierFormat, ...]:
    """Tiers of `native_tiers`: 0 int8, 1 dense, 2..8 the native codes, 9 two codes."""
    tiers = native_tiers(head_dim)
    return tuple(tiers[i] for i in indices) if indices else tiers


def ragged_cache(
    tiers: tuple[TierFormat, ...],
    *,
    n_kv_heads: int = 2,
    page_size: int = 32,
    lengths: tuple[int, ...] = RAGGED,
    seed: int = 0,
    drop_fraction: float = 0.0,
) -> PagedCache:
    """Gaussian tokens on the CPU; dead rows hold NaN wherever the format has a float."""
    head_dim = _head_dim(tiers)
    sequences: list[SequenceTokens] = [
        random_tokens(
            length, n_kv_heads, head_dim, len(tiers), page_size, seed + index,
            drop_fraction=drop_fraction,
        )
        for index, length in enumerate(lengths)
    ]  # fmt: skip
    return build_cache(tiers, page_size, sequences, dead_rows="poison")


def _head_dim(tiers: tuple[TierFormat, ...]) -> int:
    for tier in tiers:
        if tier.key_code is not None:
            return tier.key_code.head_dim
    return 128


def with_tail(cache: PagedCache, tokens: tuple[int, ...], capacity: int, seed: int) -> PagedCache:
    """The cache with a dense tail of `tokens[i]` rows; unused rows hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    shape = (cache.n_sequences, cache.n_kv_heads, capacity, cache.head_dim)
    keys = torch.randn(shape, generator=generator).to(torch.bfloat16)
    values = torch.randn(shape, generator=generator).to(torch.bfloat16)
    for index, n_tokens in enumerate(tokens):
        keys[index, :, n_tokens:] = torch.nan
        values[index, :, n_tokens:] = torch.nan
    return replace(
        cache,
        tail_keys=keys,
        tail_values=values,
        tail_tokens=torch.tensor(tokens, dtype=torch.int32),
        tail_positions=torch.full((cache.n_sequences,), 300, dtype=torch.int32),
    )


def random_query(cache: PagedCache, group_size: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (cache.n_sequences, cache.n_kv_heads * group_size, cache.head_dim)
    # Rounded to bf16 so that every query type holds the same numbers.
    return (scale * torch.randn(shape, generator=generator)).to(torch.bfloat16).to(torch.float32)


def errors(result: DecodeResult, reference: DecodeResult) -> tuple[float, float]:
    """(largest relative output error of a head, largest |log-sum-exp error|)."""
    output = result.output.cpu().to(torch.float64)
    norm = reference.output.norm(dim=-1)
    error = (output - reference.output).norm(dim=-1) / torch.where(norm > 0, norm, 1.0)
    lse, expected = result.log_sum_exp.cpu().to(torch.float64), reference.log_sum_exp
    same = lse == expected  # -inf where nothing is live
    difference = torch.where(same, 0.0, (lse - expected).abs())
    return float(error.max()), float(difference.max())


def largest_logit(query: torch.Tensor, cache: PagedCache) -> float:
    """max |q.khat| before scale and offset; 0 for an empty cache."""
    logits = ada_logits_reference(query, cache)
    parts = [logits.pages] + ([] if logits.tail is None else [logits.tail])
    live = torch.cat([part[torch.isfinite(part)] for part in parts])
    return float(live.abs().max()) if live.numel() else 0.0


def check_decode(
    cache: PagedCache,
    query: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    attention_plan: AttentionPlan | None = None,
    tolerance: float = OUTPUT_TOLERANCE,
    **options: object,
) -> DecodeResult:
    """Decode on the GPU and compare; returns the GPU's result."""
    scale = cache.head_dim**-0.5 if softmax_scale is None else softmax_scale
    reference = ada_decode_reference(query, cache, scale, **options)  # type: ignore[arg-type]
    lse_tolerance = LSE_TOLERANCE * max(1.0, largest_logit(query, cache) / 10)
    if attention_plan is None:
        attention_plan = plan(cache.to("cuda"), query.shape[1] // cache.n_kv_heads)
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    result = ada_decode(
        query.cuda(),
        attention_plan.cache,
        scale,
        plan=attention_plan,
        **moved,  # type: ignore[arg-type]
    )
    output_error, lse_error = errors(result, reference)
    assert output_error <= tolerance, f"output error {output_error:.2e}, lse error {lse_error:.2e}"
    assert lse_error <= lse_tolerance, f"lse error {lse_error:.2e}, output error {output_error:.2e}"
    return result
