"""Estimators by name: fitted on a capture, put into an allocation, and taken out again."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sphkv_cli.allocation.combination import COMBINED, Combination, LayerSamples, fit_weights
from sphkv_cli.allocation.context import Split, read_context
from sphkv_cli.allocation.estimator_names import COMBINATION, ORACLE, require_utility
from sphkv_cli.allocation.estimators import (
    Oracle,
    SignalUtility,
    UtilityEstimator,
    needs_future,
)
from sphkv_cli.allocation.future_queries import FutureQueries
from sphkv_cli.allocation.signals import SIGNALS
from sphkv_cli.artifacts.allocation import AllocationReader
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.errors import ArtifactError, UsageError
from sphkv_cli.progress import Progress
from sphkv_codebooks.frame import FrameSet

Arrays = Mapping[str, NDArray[Any]]


def fit_estimator(
    name: str,
    capture: CaptureReader,
    splits: Mapping[int, Split],
    frames: FrameSet,
    head_weights: Tensor,
    progress: Progress,
) -> UtilityEstimator:
    """The estimator of that name, with what it needs from the fit documents.

    Args:
        splits: of every fit document, by its index.
        head_weights: (n_layers, n_q_heads) F.
        progress: one step per fit document and layer, for the combination alone.

    Raises:
        UsageError: an unknown name.
        SphkvError: NaN or Inf in the capture.
    """
    require_utility(name)
    future = FutureQueries.of_capture(capture) if needs_future(name) else None
    if future is None or name != COMBINATION:
        return _plain(name, future)
    weights = list(_layer_weights(capture, splits, frames, head_weights, future, progress))
    return Combination(np.stack(weights), future)


def _layer_weights(
    capture: CaptureReader,
    splits: Mapping[int, Split],
    frames: FrameSet,
    head_weights: Tensor,
    future: FutureQueries,
    progress: Progress,
) -> Iterator[NDArray[np.float64]]:
    for layer in range(capture.n_layers):
        samples = []
        for document in capture.documents_of("fit"):
            split = splits[document.index]
            context = read_context(capture, document, layer, split, frames, head_weights[layer])
            samples.append(LayerSamples.of(context, future, COMBINED))
            progress.advance()
        yield fit_weights(samples)


def estimator_arrays(estimator: UtilityEstimator) -> dict[str, NDArray[Any]]:
    """What an allocation stores of it beside its name; empty where the name says all."""
    if isinstance(estimator, Combination):
        return {"weights": estimator.weights, **estimator.future.arrays()}
    if isinstance(estimator, SignalUtility) and estimator.future is not None:
        return dict(estimator.future.arrays())
    return {}


def estimator_signals(estimator: UtilityEstimator) -> tuple[str, ...]:
    """Names of the signals that it combines, in the order of its weights."""
    return estimator.signals if isinstance(estimator, Combination) else ()


def stored_estimator(allocation: AllocationReader) -> UtilityEstimator:
    """The score of an allocation, for any text: nothing but the file is needed.

    Raises:
        ArtifactError: its score is not known, or lacks what it needs.
    """
    name = str(allocation.info.utility["name"])
    try:
        require_utility(name)
        return _from_arrays(
            name, allocation.score_arrays, allocation.info.utility.get("signals", ())
        )
    except (UsageError, KeyError, ValueError) as error:
        raise ArtifactError(
            f"{allocation.path} holds no usable score {name!r} ({error})",
            "make it again: `sphkv allocate`",
        ) from error


def _from_arrays(name: str, arrays: Arrays, signals: Sequence[str]) -> UtilityEstimator:
    future = FutureQueries.from_arrays(arrays) if needs_future(name) else None
    if name == COMBINATION:
        assert future is not None
        return Combination(arrays["weights"], future, signals)
    return _plain(name, future)


def _plain(name: str, future: FutureQueries | None) -> UtilityEstimator:
    return Oracle() if name == ORACLE else SignalUtility(SIGNALS[name], future)
