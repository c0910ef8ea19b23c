"""Layers in parallel, one thread each: the same numbers whatever the number of cores.

Most operations here are too small to be worth splitting, and a sum that is split among more
threads rounds differently; a layer that stays on one thread does neither.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Outcome = TypeVar("Outcome")

MAX_WORKERS = 8
"""Each holds a chunk of tokens of a layer in memory."""


def each_layer(function: Callable[[int], Outcome], n_layers: int) -> Iterator[Outcome]:
    """`function(layer)` for every layer, in order; the first exception ends it."""
    n_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        max_workers=min(n_threads, MAX_WORKERS, n_layers),
        initializer=lambda: torch.set_num_threads(1),
    )
    try:
        yield from pool.map(function, range(n_layers))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(n_threads)
