"""The time of a decode step over the plan's own pages, beside bf16 attention of the same run.

    step        sum over layers of the median latency, cold L2, CUDA graphs (sphkv_kernels.timing)
    speed-up    step of the best dense bf16 attention at the same shape / step of the kernel; over
                fp8 too, where an fp8 attention is installed (sphkv_kernels.dense_attention)
    bytes       pages, metadata (the planner's records), positions where a layer is centred before
                RoPE, query and output: what one step moves
    fraction    bytes / step over the read rate measured in this run
    term        the step less that of the same pages without the term of centring before RoPE

The pages are those of the first judge document, tiled to longer contexts and larger batches at
addresses of their own.  Layers with a sliding window are left out: their step does not grow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sphkv_cli.profile.result import SpeedReport, SpeedRow
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.position_term import PositionTerm
from sphkv_kernels.tiling import tile_pages

CONTEXTS = (8192, 32768)
BATCHES = (1, 8)


@dataclass(frozen=True)
class LayerPages:
    """The plan's cache of one layer and document, on the CPU, and the layer's softmax scale;
    position_term: of one query, where the layer is centred before RoPE."""

    cache: PagedCache
    n_context: int
    softmax_scale: float
    logit_softcap: float
    position_term: PositionTerm | None = None


def measure_speed(
    layers: Sequence[LayerPages],
    n_q_heads: int,
    *,
    contexts: Sequence[int] = CONTEXTS,
    batches: Sequence[int] = BATCHES,
) -> SpeedReport:
    """Time the layers at every context and batch.  Needs a GPU.

    contexts are rounded down to whole repeats of the document.
    """
    from sphkv_kernels.dense_attention import Baseline, dense_baselines, fastest, fp8_sentence
    from sphkv_kernels.timing import device_provenance, memory_rates

    rates = memory_rates()
    first = layers[0]
    n_kv_heads, head_dim = first.cache.n_kv_heads, first.cache.head_dim
    rows = []
    every_baseline: list[Baseline] = []
    for context in contexts:
        repeats = max(1, context // first.n_context)
        n_tokens = repeats * first.n_context
        for batch in batches:
            baselines = dense_baselines(
                batch, n_kv_heads, n_tokens, n_q_heads // n_kv_heads, head_dim
            )
            every_baseline += baselines
            baseline, fp8 = fastest(baselines, "bf16"), fastest(baselines, "fp8")
            if baseline is None:
                raise RuntimeError(f"no dense attention ran {batch} x {n_tokens} tokens")
            fp8_us = None if fp8 is None else len(layers) * fp8.median_us
            steps = [_time_layer(layer, n_q_heads, batch, repeats) for layer in layers]
            step_us = sum(step.median_us for step in steps)
            bytes_read = sum(step.code_bytes + step.metadata_bytes for step in steps)
            bytes_read += len(steps) * _vector_bytes(batch, n_q_heads, head_dim)
            gb_per_s = 1e-3 * bytes_read / step_us
            baseline_us = len(layers) * baseline.median_us
            rows.append(
                SpeedRow(
                    n_context=n_tokens,
                    batch=batch,
                    n_layers=len(layers),
                    step_us=step_us,
                    step_p20_us=sum(step.p20_us for step in steps),
                    step_p80_us=sum(step.p80_us for step in steps),
                    without_term_us=sum(step.without_term_us for step in steps),
                    code_bytes=sum(step.code_bytes for step in steps),
                    metadata_bytes=sum(step.metadata_bytes for step in steps),
                    gb_per_s=gb_per_s,
                    fraction_of_read=gb_per_s / rates.read_gb_per_s,
                    baseline=baseline.name,
                    baseline_us=baseline_us,
                    speedup=baseline_us / step_us,
                    fp8_baseline=None if fp8 is None else fp8.name,
                    fp8_us=fp8_us,
                    speedup_over_fp8=None if fp8_us is None else fp8_us / step_us,
                )
            )
    provenance: dict[str, Any] = device_provenance()
    n_with_term = sum(layer.position_term is not None for layer in layers)
    return SpeedReport(
        rates.copy_gb_per_s,
        rates.read_gb_per_s,
        tuple(rows),
        n_with_term,
        provenance,
        fp8_sentence(every_baseline),
    )


@dataclass(frozen=True)
class _LayerStep:
    median_us: float
    p20_us: float
    p80_us: float
    without_term_us: float
    code_bytes: int
    metadata_bytes: int


def _time_layer(layer: LayerPages, n_q_heads: int, batch: int, repeats: int) -> _LayerStep:
    from sphkv_kernels.decode import ada_decode, plan
    from sphkv_kernels.timing import measure

    span = None if layer.position_term is None else layer.n_context
    cache = tile_pages(layer.cache.to("cuda"), batch, repeats, span=span)
    term = None
    if layer.position_term is not None:
        every = torch.zeros(batch, dtype=torch.int64)
        term = layer.position_term.select(every).to("cuda")
    generator = torch.Generator(device="cuda").manual_seed(0)
    shape = (batch, n_q_heads, cache.head_dim)
    query = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    steps = plan(cache, n_q_heads // cache.n_kv_heads)

    def step(term: PositionTerm | None) -> None:
        ada_decode(
            query,
            cache,
            layer.softmax_scale,
            logit_softcap=layer.logit_softcap,
            position_term=term,
            plan=steps,
        )

    latency = measure(partial(step, term))
    without = latency if term is None else measure(partial(step, None))
    return _LayerStep(
        latency.median_us,
        latency.p20_us,
        latency.p80_us,
        without.median_us,
        steps.work.code_bytes,
        steps.work.n_bytes + steps.position_bytes,
    )


def _vector_bytes(batch: int, n_q_heads: int, head_dim: int) -> int:
    """A bf16 query in, a float32 output and log-sum-exp out."""
    return batch * n_q_heads * (2 * head_dim + 4 * head_dim + 4)
