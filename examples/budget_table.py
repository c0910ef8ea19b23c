"""Prints one Markdown table of what a frozen policy keeps at each budget, from recorded reports.

    python examples/budget_table.py examples/results/*/table.json

Reports of `sphkv evaluate --allocation A --rows published --budget ...`.  Beside the policy stands
the method of least KL among those of no more laid-out bytes that do not choose drop and precision
jointly; KL in nats, geometric means over documents with their 95 % intervals.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from records import recorded

JOINT = ("policy", "plan", "oracle", "joint")


def lines_of(evaluation: Mapping[str, Any]) -> list[str]:
    """A line per budget, in order."""
    rows = {row["name"]: row for row in evaluation["rows"]}
    # Rows of one budget alone do not name it.
    suffixes = [name.removeprefix("policy") for name in rows if name.split(", ")[0] == "policy"]
    return [_line(evaluation["model"], suffix, rows) for suffix in suffixes]


def _line(model: str, suffix: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    policy, plan = rows[f"policy{suffix}"], rows[f"plan{suffix}"]
    most = policy["coded_laid_out_rate"] * (1 + 1e-3)
    others = [
        row
        for name, row in rows.items()
        if not name.startswith(JOINT) and row["coded_laid_out_rate"] <= most
    ]
    kl, low, high = (policy["kl_geometric"][key] for key in ("mean", "low", "high"))
    cells = [
        suffix.removeprefix(", ") or f"{policy['coded_laid_out_rate']:.3g}b",
        model,
        f"**{_kl(kl)}**" + ("" if low is None else f" [{_kl(low)}, {_kl(high)}]"),
        f"{policy['perplexity_ratio']['mean']:.3f}x",
        f"{policy['top1']['mean']:.3f}",
        f"{kl / plan['kl_geometric']['mean']:.2f}x",
    ]
    if others:
        best = min(others, key=lambda row: float(row["kl_geometric"]["mean"]))
        of_best = best["kl_geometric"]["mean"]
        name = best["name"].removesuffix(suffix)
        cells.append(f"{_kl(of_best)} ({name}): {of_best / kl:.0f}x")
    else:
        cells.append("none fits")
    return f"| {' | '.join(cells)} |"


def _kl(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.1e}"


def main() -> None:
    """Print the table of the reports named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="+", type=Path, help="reports of sphkv evaluate")
    asked = parser.parse_args()
    lines = [
        "| budget | model | policy: KL [95 %] | perplexity | top-1 | over the plan's KL | "
        "best method that is not joint |",
        "|---|---|---|---|---|---|---|",
    ]
    for report in asked.reports:
        found = lines_of(recorded(parser, report, "sphkv evaluate"))
        if not found:
            parser.error(f"{report} holds no policy at a budget; evaluate with --budget, repeated")
        lines += found
    print("\n".join(lines))


if __name__ == "__main__":
    main()
