"""Whole decode steps of a model: dense cache against coded cache, tokens per second and bytes.

    python examples/tokens_per_second.py --model smollm2 --output tokens-smollm2.json
    python examples/tokens_per_second.py --model random-7b --output tokens-7b.json

Each cell (batch, context) holds `batch` sequences of `context` tokens and generates greedily.  Keys
and values are random: a step's time does not depend on them.  Dense and coded caches are read in
two ways, launch by launch as transformers asks for them, and with the whole step in a CUDA graph:

    DynamicCache   the default of generate, copied at every step
    StaticCache    transformers' own, written in place, masked to the tokens that are there
    dense, graph   a cache of fixed length without a mask, by the fastest of torch's attention
                   backends, in a graph: what no dense cache of that length undercuts
    TIER           the coded cache launch by launch
    TIER, graph    `DecodeGraph`

Coded rows time as many steps as a page has tokens, so that one seal is among them, and share out
what making room for further pages costs (and capturing the step anew).  A cell that runs out of
memory says so.  Without a GPU only --smoke runs, on the float64 reference and without graphs; its
times mean nothing.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from script import commit, require_gpu, run
from torch import Tensor
from transformers import AttentionInterface, Cache, DynamicCache, StaticCache
from transformers.cache_utils import CacheLayerMixin

from sphkv_cli.artifacts.report import write_text
from sphkv_cli.artifacts.store import check_output
from sphkv_cli.errors import SphkvError
from sphkv_cli.generation.decode_graph import DecodeGraph
from sphkv_cli.generation.placement import UniformRule
from sphkv_cli.generation.spherical_cache import SphericalCache
from sphkv_cli.generation.synthetic import fill_at_random
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.tier import TierFormat

CODES = {
    "polar-4222-r2": ((4, 2, 2, 2), "lloyd_max:2"),
    "polar-3111-r1": ((3, 1, 1, 1), "lloyd_max:1"),
    "polar-5333-r3": ((5, 3, 3, 3), "lloyd_max:3"),
}
GRAPH = ", graph"
EAGER, DENSE_GRAPH = ("DynamicCache", "StaticCache"), "dense" + GRAPH
# hidden, intermediate, layers, query heads, KV heads, head_dim, vocabulary, positions
SHAPES = {
    "random-7b": (4096, 14336, 32, 32, 8, 128, 32000, 131072 + 4096),
    "random-smollm2": (576, 1536, 30, 9, 3, 64, 49152, 8192 + 4096),
}
DEFAULTS: dict[str, Any] = {
    "model": "smollm2",
    "batch": [1, 8, 32],
    "context": [4096, 32768, 131072],
    "steps": 8,
}
SMOKE: dict[str, Any] = {"model": "tiny", "batch": [1, 2], "context": [48, 100], "steps": 4}
TINY = (64, 96, 2, 4, 2, 32, 128, 512)


@dataclass(frozen=True)
class Cell:
    """One cache at one batch and context; None where it does not fit.

    step_ms: median step; mean_ms: mean step, seals included; room_ms: making room, due every
    room_every tokens of a sequence; tokens_per_second counts all.  how: the attention backend of
    the dense graph.
    """

    cache: str
    batch: int
    context: int
    tokens_per_second: float | None = None
    step_ms: float | None = None
    mean_ms: float | None = None
    room_ms: float | None = None
    room_every: int | None = None
    cache_bytes: int | None = None
    allocated_bytes: int | None = None
    how: str | None = None


def main() -> None:
    asked = _arguments()
    if asked.output:
        check_output(asked.output, force=asked.force)
    if not asked.smoke:
        require_gpu("run it where there is one, or pass --smoke")
    if asked.output and not asked.commit:
        asked.commit = commit()
    device = torch.device("cpu" if asked.smoke else "cuda")
    model = _model(asked.model, device)
    names = list(EAGER)
    if device.type == "cuda":
        names += [DENSE_GRAPH, *(f"{tier}{way}" for tier in asked.tier for way in ("", GRAPH))]
    else:
        names += asked.tier
    cells = []
    for context in asked.context:
        if context + 128 > model.config.max_position_embeddings:
            print(f"context {context}: beyond the model's {model.config.max_position_embeddings}")
            continue
        for batch in asked.batch:
            for name in names:
                cells.append(_cell(model, name, batch, context, asked.steps))
                print(json.dumps(asdict(cells[-1])), flush=True)
                _write(asked, model, cells)
    print(_table(cells, names))


def _write(asked: Any, model: Any, cells: list["Cell"]) -> None:
    """What is known so far: a later cell may be the one that kills the process."""
    if not asked.output:
        return
    report = {
        "model": asked.model,
        "commit": asked.commit,
        "gpu": "none, smoke run" if asked.smoke else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "steps": asked.steps,
        "dtype": str(model.dtype),
        "cells": [asdict(cell) for cell in cells],
    }
    write_text(asked.output, json.dumps(report, indent=1) + "\n")


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", choices=("smollm2", *SHAPES), help=f"default: {DEFAULTS['model']}"
    )
    parser.add_argument("--batch", type=_count, nargs="+", help=f"default: {DEFAULTS['batch']}")
    parser.add_argument("--context", type=_count, nargs="+", help=f"default: {DEFAULTS['context']}")
    parser.add_argument(
        "--steps",
        type=_count,
        help=f"of the dense caches, after three that warm up; default: {DEFAULTS['steps']}",
    )
    parser.add_argument("--tier", nargs="+", default=["polar-4222-r2"], choices=(*CODES, "int8"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--force", action="store_true", help="overwrite an existing --output")
    parser.add_argument("--commit", default="", help="where the checkout has no git history")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    asked = parser.parse_args()
    for name, value in (SMOKE if asked.smoke else DEFAULTS).items():
        if getattr(asked, name) is None:
            setattr(asked, name, value)
        elif asked.smoke:
            parser.error(f"--smoke has a --{name} of its own: leave one of them out")
    return asked


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


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
    measure = _measure_coded
    if name in EAGER:
        measure = _measure_dense
    elif name == DENSE_GRAPH:
        measure = _measure_dense_graph
    with _freed(model.device):
        try:
            with torch.inference_mode():
                return measure(model, name, batch, context, steps)
        except (torch.OutOfMemoryError, SphkvError) as error:
            if isinstance(error, SphkvError) and "out of memory" not in str(error):
                raise
            return Cell(name, batch, context)


def _measure_dense(model: Any, name: str, batch: int, context: int, steps: int) -> Cell:
    config, before = model.config, _allocated(model.device)
    # A coded cell before this one made the model attend through sphkv.
    model.set_attn_implementation("sdpa")
    cache: Any = DynamicCache(config=config)
    if name == "StaticCache":
        cache = StaticCache(config=config, max_cache_len=context + steps + 8)
    size = (batch, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        keys = torch.randn(size, device=model.device, dtype=model.dtype)
        cache.update(keys, keys.clone(), layer)
        del keys
    held = _allocated(model.device) - before
    times = _times(partial(_step, model, cache), model.device, batch, steps)
    size_bytes = sum(2 * layer.keys.nbytes for layer in cache.layers)
    return _cell_of(name, batch, context, times, cache_bytes=size_bytes, allocated_bytes=held)


class FixedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """Keys and values of a fixed number of tokens, the newest in the last row."""

    def __init__(self, size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.keys, self.values = (torch.randn(size, device=device, dtype=dtype) for _ in range(2))
        self.is_initialized = True

    supports_early_init = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All rows, the newest written."""
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Every row is a token."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        """Rows before the newest."""
        return int(self.keys.shape[2]) - 1

    def get_max_length(self) -> int:
        """Rows."""
        return int(self.keys.shape[2])

    get_max_cache_shape = get_max_length


def _attend_unmasked(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    attend = torch.nn.functional.scaled_dot_product_attention
    output = attend(query, key, value, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


def _measure_dense_graph(model: Any, name: str, batch: int, context: int, steps: int) -> Cell:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    config, device = model.config, model.device
    # A name without a mask of its own gets none.
    AttentionInterface.register("sdpa_unmasked", _attend_unmasked)
    model.set_attn_implementation("sdpa_unmasked")
    before = _allocated(device)
    # As long as the coded cache is halfway through its timed steps.
    size = (batch, config.num_key_value_heads, context + 16, config.head_dim)
    layers = [FixedLayer(size, device, model.dtype) for _ in range(config.num_hidden_layers)]
    cache = Cache(layers=layers)
    held = _allocated(device) - before
    where = torch.full((batch, 1), context, device=device)
    best: Cell | None = None
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        graph, ids = torch.cuda.CUDAGraph(), torch.zeros_like(where)
        options = {"input_ids": ids, "position_ids": where, "past_key_values": cache}
        with sdpa_kernel([backend]):
            try:
                model(**options)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                print(f"{backend.name} does not serve this cell: {str(error).splitlines()[0]}")
                continue
            _wait(device)
            with torch.cuda.graph(graph):
                logits = model(**options).logits
        step = partial(_replayed, graph, ids, logits)
        times = _times(step, device, batch, max(steps, 16))
        found = _cell_of(
            name,
            batch,
            context,
            times,
            cache_bytes=sum(2 * layer.keys.nbytes for layer in layers),
            allocated_bytes=held,
            how=backend.name,
        )
        if best is None or _speed(found) > _speed(best):
            best = found
    if best is None:
        raise SystemExit("no attention backend serves the dense graph")
    return best


def _measure_coded(model: Any, name: str, batch: int, context: int, steps: int) -> Cell:
    del steps
    config, device, tier_name = model.config, model.device, name.removesuffix(GRAPH)
    tier = TierFormat.int8()
    if tier_name in CODES:
        bits, radius = CODES[tier_name]
        tier = TierFormat.spherical(
            SphericalCode.analytic(tier_name, config.head_dim, bits, radius)
        )
    frames = FrameSet(Rotation("hadamard", config.head_dim, 42))
    before = _allocated(device)
    cache = SphericalCache(model, UniformRule.of(tier, frames, first_tokens=0))
    fill_at_random(cache, batch, context, model.dtype)
    step: Callable[[Tensor], Tensor] = partial(_step, model, cache)
    if name.endswith(GRAPH):
        step = DecodeGraph(model, cache)
    times = _times(step, device, batch, cache.rule.page_size)
    n_bytes, held = cache.memory_bytes(), _allocated(device) - before
    room, every = 0.0, 1
    moving = cache.enter_steps()
    if moving is not None:
        started = time.perf_counter()
        every = moving.make_room()
        step(torch.zeros((batch, 1), dtype=torch.int64, device=device))
        _wait(device)
        room = max(time.perf_counter() - started - statistics.median(times), 0.0)
    return _cell_of(
        name, batch, context, times, room, every, cache_bytes=n_bytes, allocated_bytes=held
    )


def _cell_of(
    name: str,
    batch: int,
    context: int,
    times: list[float],
    room: float = 0.0,
    every: int = 1,
    **sizes: Any,
) -> Cell:
    mean = statistics.mean(times)
    typical = statistics.median(times)
    # Steps of a dense cache are all alike: what is slower is the machine's own noise.
    counted = mean if every > 1 else typical
    speed = batch / (counted + room / every)
    return Cell(name, batch, context, speed, 1e3 * typical, 1e3 * mean, 1e3 * room, every, **sizes)


def _step(model: Any, cache: Any, token: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=token, past_key_values=cache).logits
    return logits


def _replayed(graph: Any, ids: Tensor, logits: Tensor, token: Tensor) -> Tensor:
    ids.copy_(token)
    graph.replay()
    return logits


def _times(
    step: Callable[[Tensor], Tensor], device: torch.device, batch: int, n_steps: int
) -> list[float]:
    """Seconds of each step after three that warm up (kernels are built, a step captured)."""
    token = torch.zeros((batch, 1), dtype=torch.int64, device=device)
    times = []
    for _ in range(n_steps + 3):
        _wait(device)
        started = time.perf_counter()
        token = step(token)[:, -1:].argmax(dim=-1)
        _wait(device)
        times.append(time.perf_counter() - started)
    return times[3:]


def _speed(cell: Cell) -> float:
    return cell.tokens_per_second or 0.0


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


def _table(cells: list[Cell], names: list[str]) -> str:
    by_place: dict[tuple[int, int], dict[str, Cell]] = {}
    for cell in cells:
        by_place.setdefault((cell.batch, cell.context), {})[cell.cache] = cell
    dense = [name for name in names if name in EAGER or name == DENSE_GRAPH]
    coded = [name for name in names if name not in dense]
    pairs = [("launches", EAGER, coded[0])]
    if len(coded) > 1:
        pairs.append(("graph", (DENSE_GRAPH,), coded[1]))
    titles = ["batch", "context", *(f"{name}, tokens/s" for name in names)]
    titles += [f"coded / dense, {way}" for way, _, _ in pairs] + ["cache, dense", "cache, coded"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for (batch, context), found in by_place.items():
        row = [str(batch), str(context)]
        row += [f"{_speed(found[n]):.1f}" if _speed(found[n]) else "does not fit" for n in names]
        for _, others, own in pairs:
            best, mine = max(_speed(found[name]) for name in others), _speed(found[own])
            ratio = f"{mine / best:.2f}" if best and mine else "only coded fits"
            row.append(ratio if mine else "does not fit")
        for group in (dense, coded):
            sizes = [found[n].cache_bytes for n in group if found[n].cache_bytes]
            row.append(f"{min(sizes) / 2**30:.2f} GiB" if sizes else "-")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
