"""Costs and bytes of all items, in parts (layers), read in blocks.

A part is anything that slices into an array (an array in memory, numpy.memmap, an HDF5 dataset):
only a block of each is in memory at a time, so a table larger than memory is streamed layer by
layer.  Blocks are independent of the number of threads, and so are all sums and their rounding.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Found = TypeVar("Found")

_BLOCK_ITEMS = 1 << 14
_BLOCKS_PER_TASK = 8


class Costs(Protocol):
    """(n_items, n_options) of float32 or float64, sliced along the first axis."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


@dataclass(frozen=True)
class Block:
    """Some items of one part; start: of the first one among all items.

    costs: (n, n_options) as given; option_bytes: (n or 1, n_options).
    """

    start: int
    costs: NDArray[np.floating]
    option_bytes: Int

    @property
    def rows(self) -> slice:
        """Of all items."""
        return slice(self.start, self.start + self.costs.shape[0])

    @property
    def is_shared(self) -> bool:
        """Whether all items have the same bytes."""
        return bool(self.option_bytes.shape[0] == 1)

    def of(self, rows: Int) -> "Block":
        """Some of its items, counted from its first."""
        sizes = self.option_bytes if self.is_shared else self.option_bytes[rows]
        return Block(self.start, self.costs[rows], sizes)

    def columns(self) -> tuple[Float, Float]:
        """Costs (n_options, n) and bytes (n_options, n or 1), copies in float64."""
        costs = np.array(self.costs.T, dtype=np.float64, order="C", copy=True)
        return costs, np.array(self.option_bytes.T, dtype=np.float64, order="C", copy=True)

    def chosen(self, options: NDArray[np.integer]) -> tuple[Float, Int]:
        """Cost and bytes of one option per item: (n) each."""
        each, picked = np.arange(options.size), options.astype(np.intp)
        sizes = self.option_bytes[0, picked] if self.is_shared else self.option_bytes[each, picked]
        return self.costs[each, picked].astype(np.float64), sizes


class CostTable:
    """The items of one allocation.

    Args:
        parts: (costs (n_items, n_options), option bytes (n_options) or (n_items, n_options)), all
            of the same options; bytes are integers >= 0 that do not fall along the options.
        n_threads: None for one per core that this process may use.

    Raises:
        ValueError: shapes, types or bytes as above do not hold.  Values of costs are checked by the
            solver's first pass.
    """

    def __init__(
        self, parts: Sequence[tuple[Costs, NDArray[np.integer]]], n_threads: int | None = None
    ) -> None:
        if not parts:
            raise ValueError("there must be one part or more")
        self._parts = [_checked(costs, sizes) for costs, sizes in parts]
        self.n_options = self._parts[0][0].shape[1]
        if any(costs.shape[1] != self.n_options for costs, _ in self._parts):
            raise ValueError("all parts must have the same options")
        self._firsts = np.cumsum([0, *(costs.shape[0] for costs, _ in self._parts)])
        self.n_items = int(self._firsts[-1])
        if not self.n_items:
            raise ValueError("costs: no items")
        self._spans = [
            (part, start, min(_BLOCK_ITEMS, costs.shape[0] - start))
            for part, (costs, _) in enumerate(self._parts)
            for start in range(0, costs.shape[0], _BLOCK_ITEMS)
        ]
        self._n_threads = n_threads or len(os.sched_getaffinity(0))

    @property
    def n_blocks(self) -> int:
        return len(self._spans)

    def bytes_of_option(self) -> Int:
        """(n_options) bytes of all items in each option."""
        total = np.zeros(self.n_options, dtype=np.int64)
        for costs, sizes in self._parts:
            total += sizes.sum(axis=0) * (costs.shape[0] if sizes.shape[0] == 1 else 1)
        return total

    def over_blocks(self, work: Callable[[Iterator[Block]], Found]) -> list[Found]:
        """`work` on runs of blocks, on all threads; results in the order of the items."""
        spans = self._spans
        tasks = [spans[i : i + _BLOCKS_PER_TASK] for i in range(0, len(spans), _BLOCKS_PER_TASK)]

        def run(task: Sequence[tuple[int, int, int]]) -> Found:
            return work(self._block(*span) for span in task)

        if self._n_threads == 1 or len(tasks) == 1:
            return [run(task) for task in tasks]
        with ThreadPoolExecutor(self._n_threads) as pool:
            return list(pool.map(run, tasks))

    def _block(self, part: int, start: int, n_rows: int) -> Block:
        costs, sizes = self._parts[part]
        rows = slice(start, start + n_rows)
        block_sizes = sizes if sizes.shape[0] == 1 else sizes[rows]
        return Block(int(self._firsts[part]) + start, np.asarray(costs[rows]), block_sizes)


def _checked(costs: Costs, sizes: NDArray[np.integer]) -> tuple[Costs, Int]:
    if len(costs.shape) != 2 or not 1 <= costs.shape[1] <= 127:
        raise ValueError(
            f"costs: shape {costs.shape}, must be (n_items, n_options) with 1 to 127 options"
        )
    n_options = costs.shape[1]
    if sizes.shape not in ((n_options,), tuple(costs.shape)):
        raise ValueError(
            f"option_bytes: shape {sizes.shape}, must be ({n_options},) or {tuple(costs.shape)}"
        )
    if not np.issubdtype(sizes.dtype, np.integer):
        raise ValueError(f"option_bytes: {sizes.dtype}, must be integers")
    sizes = sizes.reshape(-1, n_options)
    if n_options > 1 and np.diff(sizes, axis=1).min(initial=0) < 0:
        raise ValueError("options must come in order of non-decreasing bytes")
    if sizes.min(initial=0) < 0:
        raise ValueError("option_bytes must not be negative")
    return costs, sizes.astype(np.int64, copy=False)
