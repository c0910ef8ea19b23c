"""Estimators of utility: one score per token, from what is known when the context is coded.

A score orders the tokens of one (layer, KV head); its scale is free, since calibration turns it
into expected future damage.  One signal (signals.py), a fitted combination of them all
(combination.py), or the `oracle`, which asks the future itself: a ceiling, never a method.
"""

from abc import ABC, abstractmethod
from typing import final

from torch import Tensor

from sphkv_cli.allocation.context import LayerContext
from sphkv_cli.allocation.estimator_names import COMBINATION, ORACLE
from sphkv_cli.allocation.future_queries import FutureQueries
from sphkv_cli.allocation.signal_inputs import SignalInputs
from sphkv_cli.allocation.signals import SIGNALS, Signal


class UtilityEstimator(ABC):
    """Scores the tokens of a context."""

    name: str
    description: str
    is_ceiling: bool = False
    """Whether it looks at the horizon, which no deployed method can."""
    reads_all_queries: bool = False
    """Whether it needs queries of the whole context, or those of its window alone."""

    @abstractmethod
    def score(self, context: LayerContext) -> Tensor:
        """(n_kv_heads, n_context) float64 >= 0, higher = needed more; 0 = out of every reach."""


@final
class SignalUtility(UtilityEstimator):
    """One signal alone; future: for a signal that needs it."""

    def __init__(self, signal: Signal, future: FutureQueries | None = None) -> None:
        if signal.needs_future and future is None:
            raise ValueError(f"{signal.name} needs the queries of the fit documents")
        self.name, self.description = signal.name, signal.description
        self.reads_all_queries = signal.reads_all_queries
        self.future = future if signal.needs_future else None
        self._signal = signal

    def score(self, context: LayerContext) -> Tensor:
        """The signal."""
        return self._signal.compute(SignalInputs(context, self.future))


@final
class Oracle(UtilityEstimator):
    """Damage of a drop to the horizon's queries."""

    name = ORACLE
    description = "E[(p / (1 - p))^2 ||v - o||^2] over the horizon's queries: a ceiling"
    is_ceiling = True

    def score(self, context: LayerContext) -> Tensor:
        """The true future."""
        return context.horizon_utility.drop


def needs_future(name: str) -> bool:
    """Whether the estimator of that name asks queries of the fit documents."""
    return name == COMBINATION or (name in SIGNALS and SIGNALS[name].needs_future)
