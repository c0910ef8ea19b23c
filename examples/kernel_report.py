"""Measures the decode kernel on this machine's GPU and writes a JSON report with its provenance.

    python examples/kernel_report.py --output examples/results/kernel-h100.json --force

Codes x shapes with the dense baselines of the same run (FlashInfer's where it is installed), mixed
caches against the byte-weighted time of their tiers, metadata over page sizes, position terms, and
encoding. Run it from a clean checkout: the report names the commit.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from script import commit, require_gpu, run

from sphkv_cli.artifacts.report import write_text
from sphkv_cli.artifacts.store import check_output
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.benchmark import (
    CaseReport,
    Shape,
    TokenOrder,
    metadata_case,
    retention_pages,
    run_case,
    uniform_case,
    uniform_pages,
)
from sphkv_kernels.dense_attention import Baseline, dense_baselines, fp8_sentence
from sphkv_kernels.encode import encode, encode_rows
from sphkv_kernels.pages import page_bytes
from sphkv_kernels.tier import TierFormat
from sphkv_kernels.timing import MemoryRates, device_provenance, measure, memory_rates

SEED = 42
CODES: dict[str, tuple[tuple[int, int, int, int], str]] = {
    "4222-fp16": ((4, 2, 2, 2), "fp16"),
    "4333-minifloat": ((4, 3, 3, 3), "minifloat:5,6"),
    "4222-r2": ((4, 2, 2, 2), "lloyd_max:2"),
    "3222-r2": ((3, 2, 2, 2), "lloyd_max:2"),
    "4333-r3": ((4, 3, 3, 3), "lloyd_max:3"),
    "5333-r3": ((5, 3, 3, 3), "lloyd_max:3"),
    "3111-r1": ((3, 1, 1, 1), "lloyd_max:1"),
}
SHAPES = (
    Shape(4, 8, 131072, 8),
    Shape(8, 8, 32768, 4),
    Shape(1, 8, 131072, 4),
    Shape(8, 8, 8192, 4),
    Shape(1, 8, 32768, 4),
    Shape(1, 8, 4096, 4),
    Shape(8, 32, 8192, 1),
)
TWICE = Shape(4, 8, 262144, 8)
PAIRS: tuple[tuple[int, TokenOrder], ...] = (
    *((n_pairs, "runs") for n_pairs in (4, 8, 16, 32)),
    *((n_pairs, "gaps") for n_pairs in (4, 8, 16)),
    (8, "spread"),
)
"""RoPE pairs of a position term, and the order of the tokens of a page."""
EVERY_SHAPE = ("4222-fp16", "4333-minifloat", "4222-r2", "3222-r2")


def tier(name: str, head_dim: int = 128) -> TierFormat:
    bits, radius = CODES[name]
    return TierFormat.spherical(SphericalCode.analytic(name, head_dim, bits, radius))


def single_tier_cases(
    rates: MemoryRates, baselines: dict[str, tuple[Baseline, ...]]
) -> list[CaseReport]:
    """Codes x shapes."""
    reports = []
    for name in CODES:
        for shape in SHAPES if name in EVERY_SHAPE else SHAPES[:2]:
            report = run_case(
                (tier(name),), shape, rates, baselines[shape.name],
                with_reconstruction=shape in SHAPES[:2] and name in EVERY_SHAPE, seed=SEED,
            )  # fmt: skip
            reports.append(report)
            print(line(report), flush=True)
    return reports


def mixed_cases(rates: MemoryRates, baselines: dict[str, tuple[Baseline, ...]]) -> list[Any]:
    """Two tiers, four tiers, and a retention policy; against the byte-weighted single-tier time: by
    the rate of each tier in the large case, which hides a launch's start and end, and by the time
    of each tier alone in as many bytes as the mixed cache has, in rows of equal length."""
    shape = SHAPES[0]
    names = ("3222-r2", "4222-r2", "4222-fp16")
    four = (*(tier(name) for name in names), TierFormat.int8())
    generator = torch.Generator().manual_seed(SEED)

    def shuffled(n_tiers: int) -> torch.Tensor:
        size = uniform_pages(shape, 32).shape
        return torch.randint(n_tiers, size, generator=generator)

    plans = {
        "two tiers": (shape, four[:2], shuffled(2)),
        "four tiers": (shape, four, shuffled(4)),
        "retention": (shape, four, retention_pages(shape, 32, 4, SEED)),
        # As many bytes as the tiers alone have, which start and merge once too.
        "retention, twice as long": (TWICE, four, retention_pages(TWICE, 32, 4, SEED)),
    }
    rate_of_tier = {}
    for one in four:
        report = run_case((one,), shape, rates, baselines[shape.name], seed=SEED)
        rate_of_tier[one.name] = report.bytes_read["codes"] / report.latency.median_us
        print(line(report), flush=True)
    results = []
    for name, (of_plan, tiers, pages) in plans.items():
        report = run_case(
            tiers, of_plan, rates, baselines[of_plan.name], page_tiers=pages, seed=SEED
        )
        n_bytes = [
            int((pages == index).sum()) * page_bytes(one, of_plan.head_dim, 32)
            for index, one in enumerate(tiers)
        ]
        weighted = {
            "": sum(n / rate_of_tier[one.name] for n, one in zip(n_bytes, tiers, strict=True)),
            "same_bytes_": sum(
                n / sum(n_bytes) * time_alone(one, of_plan, sum(n_bytes))
                for n, one in zip(n_bytes, tiers, strict=True)
            ),
        }
        row: dict[str, Any] = {"name": name, "report": report.to_json()}
        for kind, time_us in weighted.items():
            row[f"{kind}byte_weighted_us"] = time_us
            row[f"{kind}excess"] = report.latency.median_us / time_us - 1
        results.append(row)
        print(
            f"{name}: {line(report)}; byte-weighted {row['byte_weighted_us']:.1f} us, "
            f"{row['excess']:+.1%}; by tiers of as many bytes "
            f"{row['same_bytes_byte_weighted_us']:.1f} us, {row['same_bytes_excess']:+.1%}",
            flush=True,
        )
    return results


def time_alone(one: TierFormat, like: Shape, n_bytes: int) -> float:
    """Microseconds of a cache of one tier, as many rows and n_bytes of codes."""
    of_row = n_bytes / (like.n_sequences * like.n_kv_heads)
    shape = replace(like, n_tokens=32 * round(of_row / page_bytes(one, like.head_dim, 32)))
    return uniform_case(one, shape, SEED).median_us


def metadata_cases() -> list[dict[str, Any]]:
    """Bytes and time by page size, without and with positions: what smaller pages cost."""
    cases = [
        metadata_case(tier("3222-r2"), shape, page_size, 4, SEED)
        for shape in (SHAPES[3], SHAPES[1])
        for page_size in (16, 32, 64)
    ]
    for case in cases:
        print(
            f"page size {case.page_size:2d} {case.shape.name}: {case.latency.median_us:.1f} us, "
            f"{case.with_term.median_us:.1f} us with a position term, {case.n_bytes}",
            flush=True,
        )
    return [asdict(case) for case in cases]


def position_cases() -> list[dict[str, Any]]:
    """What centring before RoPE adds to a decode step, by RoPE pairs kept."""
    rows = []
    for shape in (SHAPES[0], SHAPES[1], SHAPES[3]):
        for name in EVERY_SHAPE:
            for n_pairs, order in PAIRS:
                case = metadata_case(tier(name), shape, 32, n_pairs, SEED, order=order)
                excess = case.with_term.median_us / case.latency.median_us - 1
                rows.append({**asdict(case), "excess": excess})
                print(
                    f"position term {shape.name:15s} {name}: {case.latency.median_us:.1f} us, "
                    f"{n_pairs} pairs, {order} {case.with_term.median_us:.1f} us "
                    f"({excess:+.1%})",
                    flush=True,
                )
            torch.cuda.empty_cache()
    return rows


def encode_cases() -> list[dict[str, Any]]:
    """A prefill of 32768 tokens of 8 KV heads into pages (bf16 in, Hadamard rotation and packing
    included), and one token of 8 sequences and 8 KV heads into its row."""
    rows = []
    rotation = Rotation("hadamard", 128, SEED)
    generator = torch.Generator(device="cuda").manual_seed(SEED)
    shape = (2, 8192, 32, 128)
    keys, values = torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16)
    for name in CODES:
        one = tier(name)
        n_bytes = page_bytes(one, 128, 32)
        prefill = measure(
            lambda: encode(one, keys, values, rotation=rotation, check=False),  # noqa: B023
            n_samples=20,
        )
        pool = torch.zeros(64 * n_bytes, dtype=torch.uint8, device="cuda")
        where = n_bytes * torch.arange(64, device="cuda")
        row = torch.full((64,), 5, dtype=torch.int32, device="cuda")
        append = measure(
            lambda: encode_rows(
                one, keys[:64, 0], values[:64, 0], pool, where, row,  # noqa: B023
                page_size=32, rotation=rotation, check=False,
            ),
            n_samples=20,
        )  # fmt: skip
        rate = (keys.numel() + values.numel()) * 2 / prefill.median_us / 1e3
        rows.append({"code": name, "n_vectors": 2 * 8192 * 32, "latency": asdict(prefill),
                     "bf16_gb_per_s": rate, "append_64": asdict(append)})  # fmt: skip
        print(
            f"encode {name}: {prefill.median_us:.0f} us for 8 x 32768 keys and values, "
            f"{rate:.0f} GB/s of bf16; one token of 64 heads {append.median_us:.1f} us",
            flush=True,
        )
    return rows


def line(report: CaseReport) -> str:
    again = "" if report.reconstruct is None else f", rebuilt {report.reconstruct.median_us:.0f} us"
    if report.speed_up_over_fp8 is not None:
        again = f", {report.speed_up_over_fp8:.2f}x {report.best_fp8}{again}"
    return (
        f"{'+'.join(report.tiers):16s} {report.shape.name:15s} {report.latency.median_us:7.1f} us "
        f"{report.code_gb_per_s:5.0f} GB/s {report.fraction_of_read_rate:5.1%} of read, "
        f"{report.speed_up:.2f}x {report.best_bf16}{again}; error {report.output_error:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="overwrite an existing --output")
    parser.add_argument("--commit", default="", help="where the checkout has no git history")
    arguments = parser.parse_args()
    # Minutes of measurement end in this file: refuse now what could not be written then.
    check_output(arguments.output, force=arguments.force)
    require_gpu()
    of_commit = arguments.commit or commit()
    started = time.time()
    rates = memory_rates()
    print(rates, flush=True)
    baselines = {}
    for shape in (*SHAPES, TWICE):
        baselines[shape.name] = dense_baselines(
            shape.n_sequences, shape.n_kv_heads, shape.n_tokens, shape.group_size, shape.head_dim
        )
        for one in baselines[shape.name]:
            found = one.reason if one.latency is None else f"{one.latency.median_us:.1f} us"
            print(shape.name, one.name, found, flush=True)
        torch.cuda.empty_cache()
    report = {
        "provenance": {
            **device_provenance(), "commit": of_commit, "seed": SEED,
            "command": "python examples/kernel_report.py",
            "fp8_baseline": fp8_sentence([one for found in baselines.values() for one in found]),
        },
        "rates": asdict(rates),
        "baselines": {name: [asdict(b) for b in found] for name, found in baselines.items()},
        "cases": [case.to_json() for case in single_tier_cases(rates, baselines)],
        "mixed": mixed_cases(rates, baselines),
        "metadata": metadata_cases(),
        "position_term": position_cases(),
        "encode": encode_cases(),
    }  # fmt: skip
    report["provenance"]["seconds"] = round(time.time() - started, 1)
    write_text(arguments.output, json.dumps(report, indent=1) + "\n")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run(main)
