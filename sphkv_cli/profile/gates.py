"""Limits on the report: each is checked against the plan, and one that fails ends with exit 3."""

from sphkv_cli.errors import GateFailed
from sphkv_cli.profile.options import Gates
from sphkv_cli.profile.result import CandidateReport, GateOutcome, ProfileReport, WorstHead


def check_gates(
    gates: Gates, plan: CandidateReport, speedup: float | None
) -> tuple[GateOutcome, ...]:
    """Every limit that was set, with what it met.

    Args:
        speedup: of a decode step over the best bf16 baseline, at the shape where it is smallest.
    """
    outcomes = []
    limits: tuple[tuple[str, float | None, WorstHead], ...] = (
        ("logit rmse", gates.max_logit_rmse, plan.worst_logit_rmse),
        ("attention KL", gates.max_kl, plan.worst_attention_kl),
        ("output error", gates.max_output_error, plan.worst_output_error),
    )
    for name, limit, worst in limits:
        if limit is not None:
            where = f"layer {worst.layer}, query head {worst.head}"
            # A NaN is no number that keeps a limit.
            outcomes.append(GateOutcome(name, limit, worst.value, where, worst.value <= limit))
    if gates.min_speedup is not None:
        # No time at all (only windowed layers) is no speed-up.
        value = float("nan") if speedup is None else speedup
        passed = value >= gates.min_speedup
        outcomes.append(GateOutcome("speed-up", gates.min_speedup, value, "slowest shape", passed))
    return tuple(outcomes)


def require_gates(report: ProfileReport) -> None:
    """Call it when the report is written and shown.

    Raises:
        GateFailed: a limit does not hold; names each, its value and where.
    """
    failed = [gate for gate in report.content.gates if not gate.passed]
    if not failed:
        return
    said = "; ".join(
        f"{gate.name} is {gate.value:.4g} ({gate.where}), the limit is {gate.limit:.4g}"
        for gate in failed
    )
    raise GateFailed(said, f"the report is in {report.path}")
