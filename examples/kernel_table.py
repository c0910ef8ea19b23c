"""Prints the README's kernel table from recorded reports.

python examples/kernel_table.py examples/results/kernel-h100.json examples/results/kernel-h200.json
"""

import argparse
from pathlib import Path
from typing import Any

from records import recorded

CODES = {
    "4222-fp16": "4/2/2/2 fp16 (the paper's)",
    "4333-minifloat": "4/3/3/3 minifloat",
    "4222-r2": "4/2/2/2 r2",
    "3222-r2": "3/2/2/2 r2",
}


def name_of(case: dict[str, Any]) -> str:
    """batch x KV heads x context x group size."""
    shape = case["shape"]
    return "x".join(
        str(shape[key]) for key in ("n_sequences", "n_kv_heads", "n_tokens", "group_size")
    )


def table(report: dict[str, Any]) -> list[str]:
    """Markdown lines: one row per shape, one column per code, then the mixed caches."""
    provenance, rates = report["provenance"], report["rates"]
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for case in report["cases"]:
        (tier,) = case["tiers"]
        if tier in CODES and case["shape"]["head_dim"] == 128 and case["page_size"] == 32:
            cases.setdefault(name_of(case), {})[tier] = case
    lines = [
        f"{provenance['gpu']}, reads {rates['read_gb_per_s']:.0f} GB/s, "
        f"commit {provenance['commit'][:7]}:",
        "",
        "| batch x KV heads x context x group | best bf16, us | best fp8, us | "
        + " | ".join(CODES.values())
        + " |",
        "|---|---|---|" + "---|" * len(CODES),
    ]
    for shape, row in cases.items():
        best = next(iter(row.values()))
        cells = [
            f"{case['speed_up']:.2f}x, {100 * case['fraction_of_read_rate']:.0f} %"
            if (case := row.get(tier))
            else "-"
            for tier in CODES
        ]
        bf16 = f"{best['best_bf16_us']:.0f} ({best['best_bf16']})"
        fp8 = f"{best['best_fp8_us']:.0f} ({best['best_fp8']})" if best.get("best_fp8") else "-"
        lines.append(f"| {shape} | {bf16} | {fp8} | " + " | ".join(cells) + " |")
    yardsticks = {
        "excess": "by their rates in the large case",
        "same_bytes_excess": "by their times alone in as many bytes",
    }
    found = [
        f"{name}: "
        + ", ".join(f"{row['name']} {round(100 * row[key]):+d} %" for row in report["mixed"])
        for key, name in yardsticks.items()
        if key in report["mixed"][0]
    ]
    lines += ["", f"Mixed caches against the byte-weighted time of their tiers {'; '.join(found)}."]
    return lines


def main() -> None:
    """Print the tables of the reports named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", type=Path, nargs="+")
    paths = parser.parse_args().reports
    reports = [recorded(parser, path, "examples/kernel_report.py") for path in paths]
    for report in reports:
        print("\n".join([*table(report), ""]))


if __name__ == "__main__":
    main()
