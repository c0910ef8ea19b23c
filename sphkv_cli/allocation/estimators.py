"""Estimators of utility: one score per token, from what is known when the context is coded.

A score orders the tokens of one (layer, KV head); its scale is free, since calibration turns it
into expected future damage.  `window` asks the last queries of the context (SnapKV 2404.14469 sums
their attention; here the score is the damage that dropping the token would have done to them,
unpooled).  `recency` asks nobody.  `oracle` asks the future itself: a ceiling, never a method.
"""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from sphkv_cli.allocation.context import LayerContext
from sphkv_cli.errors import UsageError


class UtilityEstimator(ABC):
    """Scores the tokens of a context."""

    name: str
    description: str
    is_ceiling: bool = False
    """Whether it looks at the horizon, which no deployed method can."""

    @abstractmethod
    def score(self, context: LayerContext) -> Tensor:
        """(n_kv_heads, n_context) float64 >= 0, higher = needed more."""


@final
class WindowUtility(UtilityEstimator):
    """Damage of a drop to the window's queries, times the part of the future that can see it."""

    name = "window"
    description = "E[(p / (1 - p))^2 ||v - o||^2] over the last queries of the context"

    def score(self, context: LayerContext) -> Tensor:
        """As the class says; the very last tokens, which no captured query saw, score like the
        window's mean."""
        drop = context.window_utility.drop.clone()
        unseen = ~context.seen_in_window()
        if bool(unseen.any()):
            start = int(context.positions[context.split.window_rows][0])
            drop[:, unseen] = drop[:, start:][:, ~unseen[start:]].mean(dim=1, keepdim=True)
        return drop * context.reach()


@final
class Recency(UtilityEstimator):
    """Nothing but position: 1 / (tokens from the end)."""

    name = "recency"
    description = "1 / (distance to the end of the context)"

    def score(self, context: LayerContext) -> Tensor:
        """The same in every head."""
        n_context = context.n_context
        distance = torch.arange(n_context, 0, -1, dtype=torch.float64)
        return (context.reach() / distance).expand(context.keys.shape[1], n_context).clone()


@final
class Oracle(UtilityEstimator):
    """Damage of a drop to the horizon's queries."""

    name = "oracle"
    description = "E[(p / (1 - p))^2 ||v - o||^2] over the horizon's queries: a ceiling"
    is_ceiling = True

    def score(self, context: LayerContext) -> Tensor:
        """The true future."""
        return context.horizon_utility.drop


ESTIMATORS: tuple[type[UtilityEstimator], ...] = (WindowUtility, Recency, Oracle)


def estimator_of(name: str) -> UtilityEstimator:
    """The estimator of that name.

    Raises:
        UsageError: unknown; lists the known ones.
    """
    for kind in ESTIMATORS:
        if kind.name == name:
            return kind()
    known = ", ".join(kind.name for kind in ESTIMATORS)
    raise UsageError(f"utility {name!r} is not known", f"choose one of {known}")
