"""How far the predictions can be believed: model against measurement, layer by layer.

Three steps lie between a score and the output error, each checked on documents that were not
fitted on (the select ones):

    errors   sum_t u(t) ||e(t)||^2 with the true future u, against the measured output error of a
             uniform tier: is the first-order model right?
    future   what dropping a page would cost by its calibrated scores, against the true future: does
             the score know?
    drops    measured output error of the plan's dropped tokens alone, over their summed true
             cost: the coherence that c_drop stands for;
    codes    the same of its coded tokens: what c_code stands for.

Correlations are of logarithms; a ratio is predicted over measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sphkv_cli.allocation.coding import round_trip
from sphkv_cli.allocation.context import read_context
from sphkv_cli.allocation.measure import MeasuredDocument
from sphkv_cli.allocation.output_error import HorizonAttention
from sphkv_cli.allocation.page_costs import Coefficients
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.progress import Progress
from sphkv_codebooks.frame import FrameSet
from sphkv_kernels.tier import TierFormat

Float = NDArray[np.float64]


@dataclass(frozen=True)
class LayerAgreement:
    """One layer; ratios are predicted / measured, NaN where nothing was measured.

    drop_coefficient, code_coefficient: what the plan priced drops and codes at, geometric means
    over heads.
    """

    layer: int
    error_log_correlation: float
    error_ratio: float
    future_log_correlation: float
    future_ratio: float
    drop_coherence: float
    drop_coefficient: float
    code_coherence: float
    code_coefficient: float


@dataclass(frozen=True)
class MeasuredErrors:
    """Measured output errors of one document's plans, each (n_layers, n_kv_heads).

    drops: only the dropped tokens of the first plan missing, nothing coded; codes: its coded tokens
    coded, nothing dropped.
    """

    plans: Mapping[str, Float]
    drops: Float
    codes: Float


def measure_plans(
    capture: CaptureReader,
    document: MeasuredDocument,
    frames: FrameSet,
    tiers: Sequence[TierFormat],
    plans: Mapping[str, NDArray[np.int8]],
    head_weights: Tensor,
    progress: Progress,
) -> MeasuredErrors:
    """Measure every plan; advances progress by one per layer.

    Args:
        plans: (n_layers, n_kv_heads, n_context) option of each token, 0 = dropped.
        head_weights: (n_layers, n_q_heads) F.
    """
    shape = (capture.n_layers, capture.n_kv_heads)
    by_plan = {name: np.empty(shape) for name in plans}
    drops, codes = np.empty(shape), np.empty(shape)
    for layer in range(capture.n_layers):
        context = read_context(
            capture, document.info, layer, document.split, frames, head_weights[layer]
        )
        keys = context.keys_framed[: document.n_context]
        values = context.values_framed[: document.n_context]
        options = {name: torch.from_numpy(plan[layer].T.copy()) for name, plan in plans.items()}
        coded = {name: (keys.clone(), values.clone()) for name in plans}
        for option, tier in enumerate(tiers, start=1):
            wanted = {name: chosen == option for name, chosen in options.items()}
            anywhere = torch.stack(list(wanted.values())).any(dim=0)
            if not bool(anywhere.any()):
                continue
            k_tier = round_trip(tier.key_format, keys[anywhere], layer)
            v_tier = round_trip(tier.value_format, values[anywhere], layer)
            for name, mask in wanted.items():
                k_hat, v_hat = coded[name]
                k_hat[mask], v_hat[mask] = k_tier[mask[anywhere]], v_tier[mask[anywhere]]
        attention = HorizonAttention.of(context)
        for name, (k_hat, v_hat) in coded.items():
            error = attention.output_error(k_hat, v_hat, options[name] == 0)
            by_plan[name][layer] = error.numpy()
        dropped = next(iter(options.values())) == 0
        drops[layer] = attention.output_error(keys, values, dropped).numpy()
        codes[layer] = attention.output_error(*next(iter(coded.values()))).numpy()
        progress.advance()
    return MeasuredErrors(by_plan, drops, codes)


def layer_agreement(
    documents: list[MeasuredDocument],
    measured: list[MeasuredErrors],
    predicted_pages: list[Float],
    true_pages: list[Float],
    drop_plans: list[NDArray[np.int8]],
    coefficients: Coefficients,
) -> tuple[LayerAgreement, ...]:
    """Compare, per layer, over documents, heads, and tiers or pages.

    Args:
        predicted_pages, true_pages: per document (n_layers, n_kv_heads, n_pages, n_options), of
            which option 0 (drop) is compared.
        drop_plans: per document (n_layers, n_kv_heads, n_context), the plan of `measured.drops`.
        coefficients: of the plans.
    """
    rows = []
    for layer in range(measured[0].drops.shape[0]):
        model, truth = [], []
        drop_sum = drop_measured = code_sum = code_measured = 0.0
        for document, errors, plan in zip(documents, measured, drop_plans, strict=True):
            assert document.horizon is not None
            assert document.output_errors is not None
            for tier in range(document.errors.n_tiers):
                cost = document.errors.token_costs(tier, layer, document.horizon)
                code_sum += float(cost[plan[layer] == tier + 1].sum())
                model.append(cost.sum(axis=-1))
                truth.append(document.output_errors[tier, layer])
            drop_sum += float(document.horizon.drop[layer][plan[layer] == 0].sum())
            drop_measured += float(errors.drops[layer].sum())
            code_measured += float(errors.codes[layer].sum())
        predicted = np.concatenate([pages[layer, ..., 0].ravel() for pages in predicted_pages])
        true = np.concatenate([pages[layer, ..., 0].ravel() for pages in true_pages])
        rows.append(
            LayerAgreement(
                layer,
                log_correlation(np.concatenate(model), np.concatenate(truth)),
                _ratio(float(np.sum(model)), float(np.sum(truth))),
                log_correlation(predicted, true),
                _ratio(float(predicted.sum()), float(true.sum())),
                _ratio(drop_measured, drop_sum),
                _geometric_mean(coefficients.drop[layer]),
                _ratio(code_measured, code_sum),
                _geometric_mean(coefficients.code[layer]),
            )
        )
    return tuple(rows)


def log_correlation(one: Float, other: Float) -> float:
    """Pearson correlation of the logarithms of positive pairs; NaN with fewer than three."""
    both = (one > 0) & (other > 0)
    if both.sum() < 3:
        return float("nan")
    x, y = np.log(one[both]), np.log(other[both])
    if x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _geometric_mean(values: Float) -> float:
    return float(np.exp(np.log(values).mean()))


def _ratio(one: float, other: float) -> float:
    return one / other if other > 0 else float("nan")
