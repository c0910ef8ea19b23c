"""What `profile` found, as plain data: the content of report.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sphkv_cli.profile.laid_out import LaidOutTerms

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class HeadErrors:
    """Quantisation error, codes in float64 against dense keys: ``(n_layers, n_q_heads)`` each.

    logit_*: softmax_scale (q.khat - q.k) over the pairs of horizon queries and kept context
    tokens; predicted_rmse from the codes' closed-form distortion, expected_rmse from the encode
    errors made, both for isotropic errors; bound: no logit error can exceed it.
    attention_kl, attention_kl_max: nats, mean and maximum over queries.  output_error: relative,
    rms over queries; output_error_max: of the worst query.  NaN where a head kept nothing.
    """

    logit_rmse: FloatArray
    logit_p99: FloatArray
    logit_max: FloatArray
    predicted_rmse: FloatArray
    expected_rmse: FloatArray
    bound: FloatArray
    attention_kl: FloatArray
    attention_kl_max: FloatArray
    output_error: FloatArray
    output_error_max: FloatArray


@dataclass(frozen=True, eq=False)
class ComputationErrors:
    """A decode backend against the float64 decode of the same codes: ``(n_layers, n_q_heads)``.

    logit_max: largest scaled logit difference; output_error: relative, rms over queries;
    lse_max: largest difference of a log-sum-exp.
    """

    logit_max: FloatArray
    output_error: FloatArray
    lse_max: FloatArray


@dataclass(frozen=True)
class WorstHead:
    """The largest value of a quantity over all layers and query heads, and where it is."""

    value: float
    layer: int
    head: int


@dataclass(frozen=True)
class CandidateReport:
    """The plan, its frozen policy, or one tier for every token.

    kind: "plan", "policy" or "uniform".  bytes: summed over documents; rates in bits per
    coordinate; bf16_ratio: bytes of plain bf16 over all of `bytes`.  token_shares: fraction of the
    tokens in each option, drop first.  logit_rmse: over all pairs; attention_kl: mean over heads;
    output_error: rms over heads; weighted_output_error: sum over layers and heads of the
    allocation's head weight times E ||ohat - o||^2, what the allocation minimises.
    kernel: of the CUDA kernel; recursion: of the reference's angle-domain recursion.
    """

    name: str
    kind: Literal["plan", "policy", "uniform"]
    bytes: LaidOutTerms
    laid_out_bytes: float
    code_rate: float
    laid_out_rate: float
    bf16_ratio: float
    token_shares: tuple[float, ...]
    logit_rmse: float
    attention_kl: float
    output_error: float
    weighted_output_error: float
    worst_logit_rmse: WorstHead
    worst_attention_kl: WorstHead
    worst_output_error: WorstHead
    largest_bound_share: float
    heads: HeadErrors
    kernel: ComputationErrors | None = None
    recursion: ComputationErrors | None = None


@dataclass(frozen=True)
class DocumentRow:
    """A judged document."""

    name: str
    n_tokens: int
    n_context: int
    n_queries: int
    plan_bytes: float


@dataclass(frozen=True)
class GateOutcome:
    """One limit and what it met; `where` names the worst layer and head."""

    name: str
    limit: float
    value: float
    where: str
    passed: bool


@dataclass(frozen=True)
class SpeedRow:
    """A decode step of all timed layers at one shape.

    n_context: tokens of a sequence; step_us, step_p20_us, step_p80_us: sums over layers;
    without_term_us: step_us without the terms of centring before RoPE, for what they cost;
    baseline: the best dense bf16 attention of this run, baseline_us for as many layers;
    fp8_baseline likewise, None where no fp8 attention ran.
    """

    n_context: int
    batch: int
    n_layers: int
    step_us: float
    step_p20_us: float
    step_p80_us: float
    without_term_us: float
    code_bytes: int
    metadata_bytes: int
    gb_per_s: float
    fraction_of_read: float
    baseline: str
    baseline_us: float
    speedup: float
    fp8_baseline: str | None
    fp8_us: float | None
    speedup_over_fp8: float | None


@dataclass(frozen=True)
class SpeedReport:
    """Ceilings of the run, a row per shape, how many layers are centred before RoPE, the device as
    the driver describes it, and a sentence on the fp8 baseline."""

    copy_gb_per_s: float
    read_gb_per_s: float
    rows: tuple[SpeedRow, ...]
    n_layers_with_term: int
    device: Mapping[str, Any]
    fp8: str

    @property
    def smallest_speedup(self) -> float:
        """Over all shapes: what a limit is held against."""
        return min(row.speedup for row in self.rows)


@dataclass(frozen=True)
class ReportContent:
    """What report.json says; `candidates` has the plan first, then the policy, then the tiers.

    accuracy_only: no GPU ran, so there is no speed in this report.  device: the GPU, or "none".
    options: drop, then the allocation's tiers, as in `token_shares`.  speed: None without a GPU, or
    where every layer has a sliding window.
    """

    model: str
    backend: str
    accuracy_only: bool
    device: str
    page_size: int
    horizon: int
    options: tuple[str, ...]
    documents: tuple[DocumentRow, ...]
    candidates: tuple[CandidateReport, ...]
    speed: SpeedReport | None
    gates: tuple[GateOutcome, ...]
    reading: tuple[str, ...]


@dataclass(frozen=True)
class ProfileReport:
    """The written report and how long it took."""

    path: str
    digest: str
    content: ReportContent
    seconds: float
