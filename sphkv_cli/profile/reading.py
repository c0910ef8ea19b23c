"""What the numbers of a report mean, in sentences."""

from collections.abc import Sequence

import numpy as np

from sphkv_cli.blocks import times_text
from sphkv_cli.profile.result import CandidateReport

_COLLAPSE = 1.0
"""A head whose output error reaches its output: in every model that collapsed when coded, some head
was there (measured on SmolLM2-135M and Qwen2.5-Coder-0.5B)."""


def read_candidates(candidates: Sequence[CandidateReport], decoder_note: str) -> tuple[str, ...]:
    """Verdicts first, then what to make of the columns."""
    plan = candidates[0]
    uniform = [c for c in candidates if c.kind == "uniform"]
    said = [decoder_note] if decoder_note else []
    said += [_against_uniform(plan, uniform), _prediction(uniform), _bound(candidates)]
    said += [_collapse(c) for c in candidates[:2] if c.worst_output_error.value >= _COLLAPSE]
    return tuple(sentence for sentence in said if sentence)


def _against_uniform(plan: CandidateReport, uniform: Sequence[CandidateReport]) -> str:
    fitting = [c for c in uniform if c.laid_out_bytes <= plan.laid_out_bytes]
    size = f"{plan.laid_out_rate:.3f} bits per coordinate laid out"
    if not fitting:
        return f"The plan takes {size}, less than any tier measured here would for every token."
    best = min(fitting, key=lambda c: c.weighted_output_error)
    ratio = best.weighted_output_error / max(plan.weighted_output_error, 1e-300)
    compared = (
        f"the best single tier within its bytes ({best.name}, {best.laid_out_rate:.3f} bits) has "
        f"{times_text(ratio, 3)} times its weighted squared output error"
    )
    if ratio < 1:
        return f"Uniform wins: at {size} {compared}."
    return f"The plan wins: at {size}; {compared}."


def _prediction(uniform: Sequence[CandidateReport]) -> str:
    if not uniform:
        return ""
    ratios = [
        float(np.nanmedian(c.heads.logit_rmse / c.heads.expected_rmse))
        for c in uniform
        if np.isfinite(c.heads.expected_rmse).any() and np.nanmax(c.heads.expected_rmse) > 0
    ]
    if not ratios:
        return ""
    return (
        "Measured over expected logit rmse, median head: "
        f"{min(ratios):.2f} to {max(ratios):.2f} over the tiers (1 = the error is isotropic in the "
        "frame, as the design assumes)."
    )


def _bound(candidates: Sequence[CandidateReport]) -> str:
    shares = [c.largest_bound_share for c in candidates if np.isfinite(c.largest_bound_share)]
    if not shares:
        return ""
    if max(shares) > 1 + 1e-6:
        return f"A logit error exceeds its bound ({max(shares):.3f} of it): report this as a bug."
    return f"No logit error exceeds {100 * max(shares):.0f} % of its deterministic bound."


def _collapse(candidate: CandidateReport) -> str:
    worst = candidate.worst_output_error
    return (
        f"Warning: under the {candidate.name} the output error of layer {worst.layer}, query head "
        f"{worst.head} is {worst.value:.2f} of its output; heads like that break models."
    )
