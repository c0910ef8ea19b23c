"""Whole decode steps of a model: dense cache against coded cache, tokens per second and bytes.

    python examples/tokens_per_second.py --model smollm2 --output tokens-smollm2.json
    python examples/tokens_per_second.py --model random-7b --output tokens-7b.json

Each cell (batch, context) holds `batch` sequences of `context` tokens and generates greedily.  Keys
and values are random: a step's time does not depend on them.  Dense rows are transformers' own
caches: DynamicCache (the default of generate, copied at every step) and StaticCache (written in
place); the faster of the two is what the coded cache is compared with.  A cell that runs out of
memory says so.  The coded cache reads its pages with the CUDA kernel; without a GPU only --smoke
runs, on the float64 reference, and its times mean nothing.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sphkv_cli.errors import SphkvError
from sphkv_cli.generation.placement import UniformRule
from sphkv_cli.generation.spherical_cache import SphericalCache
from sphkv_cli.generation.synthetic import fill_at_random, time_of_seal
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.tier import TierFormat

CODES = {
    "polar-4222-r2": ((4, 2, 2, 2), "lloyd_max:2"),
    "polar-3111-r1": ((3, 1, 1, 1), "lloyd_max:1"),
    "polar-5333-r3": ((5, 3, 3, 3), "lloyd_max:3"),
}
DENSE = ("DynamicCache", "StaticCache")
# hidden, intermediate, layers, query heads, KV heads, head_dim, vocabulary, positions
SHAPES = {
    "random-7b": (4096, 14336, 32, 32, 8, 128, 32000, 131072 + 4096),
    "random-smollm2": (576, 1536, 30, 9, 3, 64, 49152, 8192 + 4096),
}
TINY = (64, 96, 2, 4, 2, 32, 128, 512)


@dataclass(frozen=True)
class Cell:
    """One cache at one batch and context; None where it does not fit.

    step_ms: median step; seal_ms: putting a page of each sequence (or more, in large caches) onto
    pages in all layers, due every seal_every tokens; tokens_per_second counts both.
    """

    cache: str
    batch: int
    context: int
    tokens_per_second: float | None
    step_ms: float | None
    seal_ms: float | None
    seal_every: int | None
    cache_bytes: int | None
    allocated_bytes: int | None


def main() -> None:
    asked = _arguments()
    if asked.smoke:
        asked.batch, asked.context, asked.steps = [1, 2], [48, 100], 4
    elif not torch.cuda.is_available():
        raise SystemExit("no CUDA device: only --smoke runs here")
    device = torch.device("cpu" if asked.smoke else "cuda")
    model = _model("tiny" if asked.smoke else asked.model, device)
    cells = []
    for context in asked.context:
        if context + asked.steps + 8 > model.config.max_position_embeddings:
            print(f"context {context}: beyond the model's {model.config.max_position_embeddings}")
            continue
        for batch in asked.batch:
            for name in (*DENSE, *asked.tier):
                cells.append(_cell(model, name, batch, context, asked.steps))
                print(json.dumps(asdict(cells[-1])), flush=True)
    print(_table(cells, asked.tier))
    if asked.output:
        gpu = "none, smoke run" if asked.smoke else torch.cuda.get_device_name()
        report = {
            "model": asked.model,
            "gpu": gpu,
            "torch": torch.__version__,
            "steps": asked.steps,
            "dtype": str(model.dtype),
            "cells": [asdict(cell) for cell in cells],
        }
        Path(asked.output).write_text(json.dumps(report, indent=1) + "\n")


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", choices=("smollm2", *SHAPES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 16384, 65536, 131072])
    parser.add_argument("--steps", type=int, default=24, help="timed after two that warm up")
    parser.add_argument("--tier", nargs="+", default=["polar-4222-r2"], choices=(*CODES, "int8"))
    parser.add_argument("--output")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    return parser.parse_args()


def _model(name: str, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    if name == "smollm2":
        from sphkv_cli.models.load import LoadOptions, load_model
        from sphkv_cli.models.source import resolve_model

        return load_model(resolve_model(name), LoadOptions("bfloat16", str(device)))
    size = TINY if name == "tiny" else SHAPES[name]
    config = LlamaConfig(
        hidden_size=size[0],
        intermediate_size=size[1],
        num_hidden_layers=size[2],
        num_attention_heads=size[3],
        num_key_value_heads=size[4],
        head_dim=size[5],
        vocab_size=size[6],
        max_position_embeddings=size[7],
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(42)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def _cell(model: Any, name: str, batch: int, context: int, steps: int) -> Cell:
    """Fill a cache, generate, and measure; whatever runs out of memory does not fit."""
    make = _dense if name in DENSE else _coded
    with _freed(model.device):
        before = _allocated(model.device)
        try:
            with torch.inference_mode():
                cache, n_bytes = make(model, name, batch, context, steps)
                held = _allocated(model.device) - before
                step = statistics.median(_decode(model, cache, batch, steps))
                seal, every = 0.0, 1
                if isinstance(cache, SphericalCache):
                    seal, every = time_of_seal(cache)
        except (torch.OutOfMemoryError, SphkvError) as error:
            if isinstance(error, SphkvError) and "out of memory" not in str(error):
                raise
            return Cell(name, batch, context, None, None, None, None, None, None)
        size = n_bytes()
        del cache, n_bytes
    speed = batch / (step + seal / every)
    return Cell(name, batch, context, speed, 1e3 * step, 1e3 * seal, every, size, held)


def _dense(
    model: Any, name: str, batch: int, context: int, steps: int
) -> tuple[Any, Callable[[], int]]:
    from transformers import DynamicCache, StaticCache

    config = model.config
    # A coded cell before this one made the model attend through sphkv.
    model.set_attn_implementation("sdpa")
    size = (batch, config.num_key_value_heads, context, config.head_dim)
    if name == "DynamicCache":
        cache = DynamicCache(config=config)
    else:
        cache = StaticCache(config=config, max_cache_len=context + steps + 8)
    for layer in range(config.num_hidden_layers):
        keys = torch.randn(size, device=model.device, dtype=model.dtype)
        cache.update(keys, keys.clone(), layer)
        del keys
    return cache, lambda: sum(2 * layer.keys.nbytes for layer in cache.layers)


def _coded(
    model: Any, name: str, batch: int, context: int, steps: int
) -> tuple[Any, Callable[[], int]]:
    del steps
    head_dim = model.config.head_dim
    tier = TierFormat.int8()
    if name in CODES:
        bits, radius = CODES[name]
        tier = TierFormat.spherical(SphericalCode.analytic(name, head_dim, bits, radius))
    frames = FrameSet(Rotation("hadamard", head_dim, 42))
    cache = SphericalCache(model, UniformRule.of(tier, frames, first_tokens=0))
    fill_at_random(cache, batch, context, model.dtype)
    return cache, cache.memory_bytes


def _decode(model: Any, cache: Any, batch: int, steps: int) -> list[float]:
    """Seconds of each step after two that warm up (kernels are built in the first)."""
    token = torch.zeros((batch, 1), dtype=torch.int64, device=model.device)
    times = []
    for _ in range(steps + 2):
        _wait(model.device)
        started = time.perf_counter()
        logits = model(input_ids=token, past_key_values=cache).logits
        token = logits[:, -1:].argmax(dim=-1)
        _wait(model.device)
        times.append(time.perf_counter() - started)
    return times[2:]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@contextmanager
def _freed(device: torch.device) -> Iterator[None]:
    """Nothing of the last cell is left when the next begins."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    yield


def _table(cells: list[Cell], tiers: list[str]) -> str:
    by_place: dict[tuple[int, int], dict[str, Cell]] = {}
    for cell in cells:
        by_place.setdefault((cell.batch, cell.context), {})[cell.cache] = cell
    names = (*DENSE, *tiers)
    lines = ["| batch | context | " + " | ".join(f"{n}, tokens/s" for n in names)]
    lines[0] += " | coded / dense | cache, dense | cache, coded |"
    lines.append("|---" * (len(names) + 5) + "|")
    for (batch, context), found in by_place.items():
        speeds = [found[name].tokens_per_second for name in names]
        dense = max((s for s in speeds[: len(DENSE)] if s), default=None)
        coded = speeds[len(DENSE)]
        ratio = "does not fit" if coded is None else "only coded fits"
        if coded is not None and dense is not None:
            ratio = f"{coded / dense:.2f}"
        sizes = [found[name].cache_bytes for name in (*DENSE[:1], tiers[0])]
        cells_text = [f"{s:.1f}" if s else "does not fit" for s in speeds]
        bytes_text = [f"{s / 2**30:.2f} GiB" if s else "-" for s in sizes]
        row = [str(batch), str(context), *cells_text, ratio, *bytes_text]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
