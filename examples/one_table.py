"""Prints one Markdown table of quality, bytes and speed from recorded reports.

    python examples/one_table.py examples/results/smollm2/table.json \
        --kernel examples/results/kernel-h100.json --profile 2b=report.json

Quality and bytes are those of `sphkv evaluate`.  Speed is the time of one attention step against
the best bf16 attention of the same run: of codes from a kernel report (head_dim 128, one shape), of
a plan from a `sphkv profile` report of a GPU; a policy of the same budget, whose pages take as many
bytes of a similar mix of tiers, shows the plan's; `-` where nothing was timed.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from records import recorded, require_families

FAMILIES = (
    "dense",
    "integers per token",
    "fp8",
    "KIVI",
    "TurboQuant-MSE",
    "PolarQuant",
    "PolarQuant, centred",
    "our codes, uniform",
    "our codes, uniform, ends dense",
    "SnapKV, bf16",
    "plan",
    "policy",
)
_POLAR = re.compile(r"(?:polar-)?(\d{4})-(r\d|e5m6)\b")


def kernel_tier(row: str) -> str | None:
    """Name in a kernel report of the code that a row of one code reads; None if it has none."""
    if "sinks" in row:
        return None  # Dense pages beside the codes: no kernel report times them.
    if row.startswith("PolarQuant"):
        return "4222-fp16"
    codes = [_POLAR.match(name) for name in row.partition(",")[0].split("/")]
    tiers = {
        found and f"{found[1]}-{'minifloat' if found[2] == 'e5m6' else found[2]}" for found in codes
    }
    # Keys and values of two codes are a tier that no report times; a gain costs nothing.
    return tiers.pop() if len(tiers) == 1 else None


def kernel_speeds(report: Mapping[str, Any], shape: str) -> dict[str, float]:
    """Speed-up over bf16 by tier at `shape` (batch x KV heads x context x group)."""
    found = {}
    for case in report["cases"]:
        of_case = case["shape"]
        names = ("n_sequences", "n_kv_heads", "n_tokens", "group_size")
        name = "x".join(str(of_case[key]) for key in names)
        is_asked = name == shape and of_case["head_dim"] == 128 and case["page_size"] == 32
        if is_asked and len(case["tiers"]) == 1:
            found[case["tiers"][0]] = float(case["speed_up"])
    return found


def plan_speed(profile: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row of the plan that a profile timed, at the most tokens that it ran."""
    speed = profile["speed"]
    if not speed:
        return None
    row: Mapping[str, Any] = max(speed["rows"], key=lambda row: row["batch"] * row["n_context"])
    return row


def table(
    evaluation: Mapping[str, Any],
    families: tuple[str, ...],
    speeds: Mapping[str, float],
    of_plan: Mapping[str, float],
) -> list[str]:
    """Markdown lines, the rows of each family together and in order of bytes.

    speeds: by tier; of_plan: of plan and policy, by budget.
    """
    lines = [
        "| method | bits | MiB | KL | 95 % | KL p99 | perplexity | top-1 | attention step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for family in families:
        rows = [row for row in evaluation["rows"] if row["family"] == family]
        rows.sort(key=lambda row: float(row["coded_laid_out_rate"]))
        lines += [_line(row, _speed(row, speeds, of_plan)) for row in rows]
    return lines


def _speed(
    row: Mapping[str, Any], speeds: Mapping[str, float], of_plan: Mapping[str, float]
) -> float | None:
    if row["name"] == "dense":
        return 1.0
    if row["family"] in ("plan", "policy"):
        return of_plan.get(row["name"].partition(", ")[2])
    tier = kernel_tier(row["name"])
    return None if tier is None or "ends dense" in row["family"] else speeds.get(tier)


def _line(row: Mapping[str, Any], speed: float | None) -> str:
    documents = row["documents"]
    mebibytes = sum(d["coded_bytes"] for d in documents) / len(documents) / 2**20
    kl = row["kl_geometric"]
    low, high = kl["low"], kl["high"]
    cells = (
        row["name"],
        f"{row['coded_laid_out_rate']:.2f}",
        f"{mebibytes:.2f}",
        _small(kl["mean"]),
        "-" if low is None or row["name"] == "dense" else f"{_small(low)} to {_small(high)}",
        _small(row["kl_p99"]),
        f"{row['perplexity_ratio']['mean']:.3f}x",
        f"{row['top1']['mean']:.3f}",
        "-" if speed is None else f"{speed:.2f}x",
    )
    return f"| {' | '.join(cells)} |"


def _small(value: float) -> str:
    if value < 1e-6:
        return "0"
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.1e}"


def main() -> None:
    """Print the table of the report named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("evaluation", type=Path, help="a report of sphkv evaluate")
    parser.add_argument("--kernel", type=Path, help="a report of examples/kernel_report.py")
    parser.add_argument("--shape", default="8x8x32768x4", help="of the kernel report's cases")
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="BUDGET=REPORT",
        help="a report of sphkv profile on a GPU, and the budget of its allocation, repeatable",
    )
    parser.add_argument("--family", action="append", help="rows to print, repeatable")
    asked = parser.parse_args()
    evaluation = recorded(parser, asked.evaluation, "sphkv evaluate")
    require_families(parser, asked.family or (), evaluation["rows"])
    speeds, of_plan, shapes, lines = {}, {}, set(), []
    if asked.kernel is not None:
        report = recorded(parser, asked.kernel, "examples/kernel_report.py")
        speeds = kernel_speeds(report, asked.shape)
        if not speeds:
            parser.error(f"{asked.kernel} has no case {asked.shape} of head_dim 128")
        lines.append(
            f"Attention step: against bf16 on one {report['provenance']['gpu']}, {asked.shape}, "
            "head_dim 128,\nwithout the term that frames centred before RoPE add.\n"
        )
    for profile in asked.profile:
        budget, _, path = profile.partition("=")
        if not path:
            parser.error(f"--profile {profile} names no budget: give it as 2b={profile}")
        found = plan_speed(recorded(parser, Path(path), "sphkv profile"))
        if found is None:
            parser.error(f"{path} holds no speed; profile the allocation on a GPU")
        of_plan[budget] = float(found["speedup"])
        shapes.add(f"{found['batch']} x {found['n_context']}")
    if shapes:
        lines.append(f"Of plans and policies: {', '.join(sorted(shapes))} tokens of the model.\n")
    families = tuple(asked.family) if asked.family else FAMILIES
    print("\n".join([*lines, *table(evaluation, families, speeds, of_plan)]))


if __name__ == "__main__":
    main()
