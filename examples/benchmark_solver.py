"""Time and peak memory of the allocation solver on 1 and 30 million pages.

    python examples/benchmark_solver.py [--items 1000000 --items 30000000] [--threads 2]

Every item has seven options of the sizes of pages of 32 tokens at 64 dimensions (drop, 2.25, 3.25
and 4.25 bits, int8, dense) and costs over several orders of magnitude, drawn layer by layer into a
memory-mapped file: the solver reads it in blocks.  Peak memory is that of the process above what
it had before, in units of the cost table; pages of the file that the kernel keeps are in it.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from sphkv_cli.allocation.solver import solve_parts

OPTION_BYTES = np.array([0, 1291, 1803, 2315, 2827, 4299, 8203])
_RELATIVE_COSTS = np.array([1.0, 0.15, 0.04, 0.01, 3e-3, 1e-4, 1e-8])
_N_LAYERS = 32


def write_costs(path: Path, n_items: int, rng: np.random.Generator) -> list[np.memmap]:
    """The costs of every layer, float64."""
    n_options = OPTION_BYTES.size
    table = np.memmap(path, dtype=np.float64, mode="w+", shape=(n_items, n_options))
    layers = np.array_split(np.arange(n_items), _N_LAYERS)
    for items in layers:
        rows = slice(items[0], items[-1] + 1)
        needs = np.exp(rng.normal(0, 3, (items.size, 1)))
        noise = np.exp(rng.normal(0, 0.3, (items.size, n_options)))
        table[rows] = needs * _RELATIVE_COSTS * noise
    table.flush()
    return [table[items[0] : items[-1] + 1] for items in layers]


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, action="append")
    parser.add_argument("--threads", type=int, help="one per core without it")
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    for n_items in arguments.items or [1_000_000, 30_000_000]:
        with tempfile.TemporaryDirectory() as folder:
            rng = np.random.default_rng(arguments.seed)
            layers = write_costs(Path(folder) / "costs", n_items, rng)
            table_bytes = sum(layer.nbytes for layer in layers)
            before = peak_bytes()
            started = time.perf_counter()
            solution = solve_parts(
                [(layer, OPTION_BYTES) for layer in layers],
                1800 * n_items,
                n_threads=arguments.threads,
            )
            seconds = time.perf_counter() - started
            print(
                f"{n_items:>11,} items  {seconds:6.2f} s  table {table_bytes / 2**20:7.0f} MiB  "
                f"process {peak_bytes() / table_bytes:4.2f} tables at its peak "
                f"({before / table_bytes:4.2f} before)  gap {solution.gap:.1e}"
            )


if __name__ == "__main__":
    main()
