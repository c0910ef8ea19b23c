"""From the sums of all layers to what the report says of each candidate."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sphkv_cli.profile.candidate_errors import CandidateErrors
from sphkv_cli.profile.candidates import Candidate
from sphkv_cli.profile.computation import ComputationSums
from sphkv_cli.profile.laid_out import LaidOutTerms, total_of
from sphkv_cli.profile.measure import LayerMeasurement
from sphkv_cli.profile.result import (
    CandidateReport,
    ComputationErrors,
    FloatArray,
    HeadErrors,
    WorstHead,
)


def summarise(
    candidate: Candidate,
    index: int,
    layers: Sequence[LayerMeasurement],
    *,
    fixed_bytes: int,
    n_coordinates: int,
    n_documents: int,
    token_shares: tuple[float, ...],
    head_weights: FloatArray,
    decoder: str,
) -> CandidateReport:
    """One candidate's report.

    Args:
        index: of the candidate in the measurements.
        fixed_bytes: fixed tables of one context; n_coordinates: of all documents together.
        head_weights: (n_layers, n_q_heads).
    """
    errors = [layer.errors[index] for layer in layers]
    heads = _head_errors(errors)
    fixed = LaidOutTerms(fixed_tables=float(fixed_bytes * n_documents))
    terms = total_of([t for layer in layers for t in layer.terms[index]]) + fixed
    pairs = sum(float(e.logit.count.sum()) for e in errors)
    squares = sum(float(e.logit.sum_sq.sum()) for e in errors)
    mean_error_sq = _stack(errors, lambda e: e.error_sq / e.n_queries)
    sums = [layer.computations[index] for layer in layers]
    computation = _computation([s for s in sums if s is not None])
    with np.errstate(invalid="ignore", divide="ignore"):
        share = heads.logit_max / heads.bound
    return CandidateReport(
        name=candidate.name,
        kind=candidate.kind,
        bytes=terms,
        laid_out_bytes=terms.total,
        code_rate=8 * terms.payload / n_coordinates,
        laid_out_rate=8 * terms.total / n_coordinates,
        bf16_ratio=2 * n_coordinates / terms.total,
        token_shares=token_shares,
        logit_rmse=float(np.sqrt(squares / pairs)) if pairs else float("nan"),
        attention_kl=float(heads.attention_kl.mean()),
        output_error=float(np.sqrt(np.mean(heads.output_error**2))),
        weighted_output_error=float((head_weights * mean_error_sq).sum()),
        worst_logit_rmse=_worst(heads.logit_rmse),
        worst_attention_kl=_worst(heads.attention_kl),
        worst_output_error=_worst(heads.output_error),
        largest_bound_share=float(np.nanmax(share)) if np.isfinite(share).any() else float("nan"),
        heads=heads,
        kernel=computation if decoder == "cuda" else None,
        recursion=computation if decoder == "reference" else None,
    )


def _head_errors(errors: Sequence[CandidateErrors]) -> HeadErrors:
    def rms_of(sum_sq: Tensor, count: Tensor) -> Tensor:
        return (sum_sq / count).sqrt()

    tiny = torch.finfo(torch.float64).tiny
    return HeadErrors(
        logit_rmse=_stack(errors, lambda e: e.logit.rms()),
        logit_p99=_stack(errors, lambda e: e.logit.percentile(0.99)),
        logit_max=_stack(errors, lambda e: e.logit.maximum()),
        predicted_rmse=_stack(errors, lambda e: rms_of(e.predicted_sq, e.logit.count)),
        expected_rmse=_stack(errors, lambda e: rms_of(e.expected_sq, e.logit.count)),
        bound=_stack(errors, lambda e: torch.where(e.logit.count > 0, e.bound, torch.nan)),
        attention_kl=_stack(errors, lambda e: e.kl_sum / e.n_queries),
        attention_kl_max=_stack(errors, lambda e: e.kl_max),
        output_error=_stack(errors, lambda e: (e.error_sq / e.output_sq.clamp(min=tiny)).sqrt()),
        output_error_max=_stack(errors, lambda e: e.relative_max),
    )


def _computation(sums: Sequence[ComputationSums]) -> ComputationErrors | None:
    if not sums:
        return None
    return ComputationErrors(
        logit_max=torch.stack([s.logit_max for s in sums]).numpy(),
        output_error=torch.stack([s.output_error() for s in sums]).numpy(),
        lse_max=torch.stack([s.lse_max for s in sums]).numpy(),
    )


def _stack(
    errors: Sequence[CandidateErrors], pick: Callable[[CandidateErrors], Tensor]
) -> FloatArray:
    stacked: FloatArray = torch.stack([pick(e) for e in errors]).numpy()
    return stacked


def _worst(values: FloatArray) -> WorstHead:
    if not np.isfinite(values).any():
        return WorstHead(float("nan"), -1, -1)
    layer, head = np.unravel_index(int(np.nanargmax(values)), values.shape)
    return WorstHead(float(values[layer, head]), int(layer), int(head))
