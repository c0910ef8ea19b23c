"""A combination of all signals, fitted per (layer, KV head) on the fit documents.

    log score(t) = w_0 + sum_j w_j log signal_j(t),      w by weighted ridge regression on
    log drop damage(t)  by the horizon's true queries    (ours)

A token weighs as the cube root of its damage: plainly weighted logs care as much for the order of
the many tokens that nobody will miss, and now and then give away one that everybody will (on
SmolLM2-135M, leaving documents out: plans at 2 bits cost 4.3 times the oracle's, worst 85 times,
without the weights; 2.7 and 6 times with them; powers from .25 to .5 are alike).

Logs are of signals over their mean in the context, so that a context's length and level do not
matter; a token of no signal at all keeps 1e-9 of it.  The ridge acts on standardised signals, so
that the many that say nearly the same share the weight instead of cancelling.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sphkv_cli.allocation.context import LayerContext
from sphkv_cli.allocation.estimator_names import COMBINATION, SIGNAL_NAMES
from sphkv_cli.allocation.estimators import UtilityEstimator
from sphkv_cli.allocation.future_queries import FutureQueries
from sphkv_cli.allocation.signal_inputs import SignalInputs
from sphkv_cli.allocation.signals import SIGNALS

Float = NDArray[np.float64]

COMBINED = SIGNAL_NAMES
RIDGE = 1e-2
"""Penalty over the weight of all tokens."""
DAMAGE_POWER = 1 / 3
_LEAST_DAMAGE = 1e-3
"""Of the mean: tokens below it weigh alike."""
_LEAST = 1e-9


@final
class Combination(UtilityEstimator):
    """weights: (n_layers, n_kv_heads, 1 + n_signals), the constant first; signals: their names."""

    name = COMBINATION
    description = "ridge regression of log damage on the logs of the other scores"
    reads_all_queries = True

    def __init__(
        self, weights: Float, future: FutureQueries, signals: Sequence[str] = COMBINED
    ) -> None:
        if weights.shape[-1] != 1 + len(signals):
            raise ValueError(f"{weights.shape[-1]} weights for {len(signals)} signals")
        self.weights, self.future, self.signals = weights, future, tuple(signals)

    def score(self, context: LayerContext) -> Tensor:
        """As the module says; tokens that no later query can see score 0."""
        logs = log_signals(context, self.future, self.signals)
        return self.apply(logs, self.weights[context.layer]) * (context.reach() > 0)

    @staticmethod
    def apply(logs: Tensor, weights: Float) -> Tensor:
        """(n_kv_heads, n_tokens) of log signals and one layer's weights."""
        of_head = torch.from_numpy(weights).to(logs.device)
        exponent = of_head[:, 0, None] + torch.einsum("hnf,hf->hn", logs, of_head[:, 1:])
        return exponent.clamp(-300, 300).exp()


@dataclass(frozen=True)
class LayerSamples:
    """logs (n_kv_heads, n_tokens, n_signals) and target (n_kv_heads, n_tokens) of one document."""

    logs: Tensor
    target: Tensor

    @staticmethod
    def of(context: LayerContext, future: FutureQueries, signals: Sequence[str]) -> "LayerSamples":
        """Of the tokens that the horizon can see."""
        return LayerSamples.of_logs(
            log_signals(context, future, signals), context.horizon_utility.drop, context.reach() > 0
        )

    @staticmethod
    def of_logs(logs: Tensor, drop: Tensor, reached: Tensor) -> "LayerSamples":
        """Of log signals (n_kv_heads, n_context, n_signals), true damage (n_kv_heads, n_context),
        and whether the horizon can see each token (n_context)."""
        return LayerSamples(logs[:, reached], _logs(drop, dim=-1)[:, reached])


def log_signals(context: LayerContext, future: FutureQueries, signals: Sequence[str]) -> Tensor:
    """(n_kv_heads, n_context, n_signals) float64."""
    inputs = SignalInputs(context, future)
    return logs_of([SIGNALS[name].compute(inputs) for name in signals])


def logs_of(signals: Sequence[Tensor]) -> Tensor:
    """The same of signals that were computed already, (n_kv_heads, n_context) each."""
    return _logs(torch.stack(list(signals), dim=-1), dim=1)


def fit_weights(documents: Sequence[LayerSamples]) -> Float:
    """Weights of one layer from its samples: (n_kv_heads, 1 + n_signals)."""
    logs = torch.cat([document.logs for document in documents], dim=1).numpy()
    target = torch.cat([document.target for document in documents], dim=1).numpy()
    return np.stack([_ridge(x, y) for x, y in zip(logs, target, strict=True)])


def _ridge(x: Float, y: Float) -> Float:
    """Of samples x (n, n_signals) and y (n), log damage; a constant signal gets no weight."""
    if not len(y):
        return np.zeros(1 + x.shape[1])
    weight = np.maximum(np.exp(y), _LEAST_DAMAGE) ** DAMAGE_POWER
    weight /= weight.sum()
    centre = weight @ x
    away = x - centre
    spread = np.sqrt(weight @ away**2)
    scale = np.where(spread > 1e-9, spread, np.inf)
    z, mean = away / scale, float(weight @ y)
    gram = (z * weight[:, None]).T @ z + RIDGE * np.eye(z.shape[1])
    slopes = np.linalg.solve(gram, (z * weight[:, None]).T @ (y - mean)) / scale
    return np.concatenate([[mean - centre @ slopes], slopes])


def _logs(values: Tensor, *, dim: int) -> Tensor:
    """log(x / mean + 1e-9), the mean along `dim`."""
    mean = values.mean(dim=dim, keepdim=True)
    return torch.log(values / mean.clamp(min=1e-300) + _LEAST)
