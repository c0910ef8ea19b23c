"""What is in allocation.h5, and how it lies there; the reader is in `allocation.py`."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from sphkv_cli.artifacts.capture_info import LayerInfo, Split
from sphkv_cli.artifacts.frames import write_frames
from sphkv_cli.artifacts.reader import write_array
from sphkv_cli.artifacts.row_tables import write_rows
from sphkv_codebooks.frame import FrameSet
from sphkv_kernels.tier import TierFormat

FloatArray = npt.NDArray[np.float64]

PLAN_AXES = "n_layers, n_kv_heads, n_context"
SCORE_AXES = {
    "weights": "n_layers, n_kv_heads, n_weights",
    "sample": "n_layers, n_samples, n_q_heads, head_dim",
    "mean": "n_layers, n_q_heads, head_dim",
    "covariance": "n_layers, n_q_heads, head_dim, head_dim",
    "inv_freq": "n_layers, n_pairs",
}
"""Datasets that a score may need, by name."""


@dataclass(frozen=True)
class AllocationInfo:
    """What holds for the whole allocation; shapes are those of the capture.

    rope: as the capture has it.  budget: as the user gave it, of one context.  horizon, window:
    tokens.  utility: name, description and `is_ceiling` of the score; weights_source: where
    `head_weights` come from; rounding_rule: of the quotas.  pin_first, pin_last: tokens at the ends
    of a context that stay in the largest tier; no_drop: none is dropped.
    """

    model: str
    architecture: str
    model_digest: str
    n_layers: int
    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    rope: Mapping[str, Any]
    page_size: int
    budget: str
    horizon: int
    window: int
    utility: Mapping[str, Any]
    is_calibrated: bool
    drop_coefficient: float
    drop_coefficient_source: str
    weights_source: str
    rounding_rule: str
    pin_first: int = 0
    pin_last: int = 0
    no_drop: bool = False


@dataclass(frozen=True)
class CalibrationArrays:
    """Knots of the monotone tables, natural logarithms.

    starts: (n_layers, n_kv_heads, 3, 2) int64 first and past-the-last knot; third axis key, value,
    drop.  log_scores, log_values: (n_knots).
    """

    starts: npt.NDArray[np.int64]
    log_scores: FloatArray
    log_values: FloatArray


@dataclass(frozen=True)
class QuotaFitArrays:
    """What quotas are fitted from.

    pages: per fit document (n_layers, n_kv_heads, n_pages, n_options) costs by falling score, not
    priced.  rates: (n_rates) bits per coordinate, rising; drop, code: (n_rates, n_layers,
    n_kv_heads) prices there.
    """

    pages: tuple[npt.NDArray[np.float32], ...]
    rates: FloatArray
    drop: FloatArray
    code: FloatArray


@dataclass(frozen=True)
class PlanInfo:
    """One planned document.

    index: of the document in the capture; the context is its first n_context tokens.
    laid-out bytes by purpose; cost: predicted; policy_cost, policy_bytes: of the frozen quotas.
    """

    index: int
    name: str
    split: Split
    text_sha256: str
    n_tokens: int
    n_context: int
    budget_bytes: int
    codes_bytes: int
    padding_bytes: int
    page_table_bytes: int
    positions_bytes: int
    fixed_table_bytes: int
    cost: float
    dual_bound: float
    multiplier: float
    policy_cost: float
    policy_bytes: int

    @property
    def laid_out_bytes(self) -> int:
        """All of it."""
        return (
            self.codes_bytes
            + self.padding_bytes
            + self.page_table_bytes
            + self.positions_bytes
            + self.fixed_table_bytes
        )


@dataclass(frozen=True)
class StoredPlan:
    """A plan with its arrays: tiers int8 (-1 = dropped), pages int32, `PLAN_AXES`."""

    info: PlanInfo
    tier_of_token: npt.NDArray[np.int8]
    page_of_token: npt.NDArray[np.int32]
    policy_tier_of_token: npt.NDArray[np.int8]


@dataclass(frozen=True)
class AllocationContent:
    """Everything in allocation.h5 but its header.

    tiers: in order of page bytes, without drop.  quotas: (n_layers, n_kv_heads, 1 + n_tiers)
    fractions of pages, drop first, of contexts as long as the first fit document's; quota_fit: what
    they are fitted from.  head_weights: (n_layers, n_q_heads).  drop_coefficients,
    code_coefficients: (n_layers, n_kv_heads).  score_arrays: what the score needs beside its name.
    tables: rows by name, for people and plots, each with its row type.
    """

    info: AllocationInfo
    layers: tuple[LayerInfo, ...]
    frames: FrameSet
    tiers: tuple[TierFormat, ...]
    quotas: FloatArray
    quota_fit: QuotaFitArrays
    head_weights: FloatArray
    drop_coefficients: FloatArray
    code_coefficients: FloatArray
    score_arrays: Mapping[str, npt.NDArray[Any]]
    calibration: CalibrationArrays | None
    plans: tuple[StoredPlan, ...]
    tables: Mapping[str, tuple[type[Any], tuple[Any, ...]]]


def write_content(file: h5py.File, content: AllocationContent) -> None:
    """Fill the file of a new artifact."""
    for field in dataclasses.fields(AllocationInfo):
        value = getattr(content.info, field.name)
        is_mapping = isinstance(value, Mapping)
        file.attrs[field.name] = json.dumps(dict(value), sort_keys=True) if is_mapping else value
    write_rows(file, "layers", content.layers, LayerInfo)
    write_frames(file, content.frames)
    described = json.dumps([tier.describe() for tier in content.tiers], sort_keys=True)
    write_array(file, "tiers", np.array(described.encode()), "")
    write_array(file, "policy/quotas", content.quotas, "n_layers, n_kv_heads, n_options")
    for index, pages in enumerate(content.quota_fit.pages):
        axes = "n_layers, n_kv_heads, n_pages, n_options"
        write_array(file, f"policy/fit/{index:03d}", pages, axes)
    write_array(file, "policy/price_rates", content.quota_fit.rates, "n_rates")
    for name in ("drop", "code"):
        prices = getattr(content.quota_fit, name)
        write_array(file, f"policy/price_of_{name}", prices, "n_rates, n_layers, n_kv_heads")
    write_array(file, "head_weights", content.head_weights, "n_layers, n_q_heads")
    for name in ("drop_coefficients", "code_coefficients"):
        write_array(file, name, getattr(content, name), "n_layers, n_kv_heads")
    for name, array in content.score_arrays.items():
        write_array(file, f"score/{name}", array, SCORE_AXES[name])
    if content.calibration is not None:
        arrays = content.calibration
        axes = "n_layers, n_kv_heads, n_quantities, n_ends"
        write_array(file, "calibration/starts", arrays.starts, axes)
        write_array(file, "calibration/log_scores", arrays.log_scores, "n_knots")
        write_array(file, "calibration/log_values", arrays.log_values, "n_knots")
    documents = file.create_group("documents")
    for index, plan in enumerate(content.plans):
        group = documents.create_group(f"{index:03d}")
        for field in dataclasses.fields(PlanInfo):
            group.attrs[field.name] = getattr(plan.info, field.name)
        for name in ("tier_of_token", "page_of_token", "policy_tier_of_token"):
            write_array(group, name, getattr(plan, name), PLAN_AXES)
    tables = file.create_group("tables")
    for name, (row_type, rows) in content.tables.items():
        write_rows(tables, name, rows, row_type)
