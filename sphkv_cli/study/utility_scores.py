"""Scores of every estimator, with attention computed from exact and from coded keys.

A context whose keys were coded and decoded takes the place of the exact one in all that an
estimator reads of it; what the future really needs is measured on the exact one.  Combinations are
fitted on the fit documents for each kind of keys.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sphkv_cli.allocation.coding import CodedContext, TierFormats, round_trip
from sphkv_cli.allocation.combination import (
    COMBINED,
    Combination,
    LayerSamples,
    fit_weights,
    logs_of,
)
from sphkv_cli.allocation.context import LayerContext, Split, read_context
from sphkv_cli.allocation.estimator_names import COMBINATION
from sphkv_cli.allocation.future_queries import FutureQueries
from sphkv_cli.allocation.measure import MeasuredDocument
from sphkv_cli.allocation.page_costs import TierErrors, Utilities
from sphkv_cli.allocation.signal_inputs import SignalInputs
from sphkv_cli.allocation.signals import SIGNALS
from sphkv_cli.artifacts.capture import CaptureReader, DocumentInfo
from sphkv_cli.progress import Progress
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.spherical_code import SphericalCode

Float = NDArray[np.float64]

EXACT = "exact"
ESTIMATORS = (COMBINATION, *COMBINED)


@dataclass(frozen=True)
class ScoredDocument:
    """One document: what `MeasuredDocument` holds, and scores by (keys, estimator)."""

    measured: MeasuredDocument
    scores: Mapping[tuple[str, str], Float]

    def with_scores(self, keys: str, name: str) -> MeasuredDocument:
        """The document as that estimator orders it."""
        return replace(self.measured, scores=self.scores[keys, name])


@dataclass(frozen=True)
class Scoring:
    """What is scored and how.

    key_codes: by name, the codes that keys are read through; layers: of the capture, those looked
    at; head_weights: (n_layers, n_q_heads) F; splits: by document index.
    """

    capture: CaptureReader
    frames: FrameSet
    formats: TierFormats
    key_codes: Mapping[str, SphericalCode]
    layers: Sequence[int]
    head_weights: Tensor
    splits: Mapping[int, Split]
    future: FutureQueries

    @property
    def keys(self) -> tuple[str, ...]:
        """Kinds of keys: exact, then the codes."""
        return (EXACT, *self.key_codes)

    def score(
        self,
        fit: Sequence[DocumentInfo],
        other: Sequence[DocumentInfo],
        progress: Progress,
    ) -> list[ScoredDocument]:
        """Score all documents, layer by layer; one step of progress per document and layer."""
        documents = [*fit, *other]
        empty = [self._empty(document) for document in documents]
        for row, layer in enumerate(self.layers):
            contexts = []
            for document, target in zip(documents, empty, strict=True):
                split = self.splits[document.index]
                weights = self.head_weights[layer]
                context = read_context(self.capture, document, layer, split, self.frames, weights)
                self._measure(context, row, target.measured)
                contexts.append(context)
                progress.advance()
            for keys in self.keys:
                self._score_layer(keys, row, contexts, empty, n_fit=len(fit))
        return empty

    def _empty(self, document: DocumentInfo) -> ScoredDocument:
        split = self.splits[document.index]
        shape = (len(self.layers), self.capture.n_kv_heads, split.n_context)
        formats = self.formats
        errors = TierErrors(
            np.empty((len(formats.key_formats), *shape), dtype=np.float32),
            np.empty((len(formats.value_formats), *shape), dtype=np.float32),
            formats.key_of_tier,
            formats.value_of_tier,
        )
        horizon = Utilities(np.empty(shape), np.empty(shape), np.empty(shape))
        scores = {(keys, name): np.empty(shape) for keys in self.keys for name in ESTIMATORS}
        measured = MeasuredDocument(
            document, split, errors, horizon.drop, horizon, horizon, output_errors=None
        )
        return ScoredDocument(measured, scores)

    def _measure(self, context: LayerContext, row: int, into: MeasuredDocument) -> None:
        n = context.n_context
        keys, values = context.keys_framed[:n], context.values_framed[:n]
        coded = CodedContext.encode(keys, values, self.formats, context.layer)
        for errors, exact, hats in (
            (into.errors.key, keys, coded.keys),
            (into.errors.value, values, coded.values),
        ):
            for index, hat in enumerate(hats):
                errors[index, row] = (hat - exact).square_().sum(-1).T.numpy()
        assert into.horizon is not None
        for name in ("key", "value", "drop"):
            getattr(into.horizon, name)[row] = getattr(context.horizon_utility, name).numpy()

    def _score_layer(
        self,
        keys: str,
        row: int,
        contexts: Sequence[LayerContext],
        into: Sequence[ScoredDocument],
        *,
        n_fit: int,
    ) -> None:
        """One layer of all documents through one kind of keys; the first n_fit fit the weights."""
        samples, logs = [], []
        for context, target in zip(contexts, into, strict=True):
            inputs = SignalInputs(self._read_through(keys, context), self.future)
            signals = [SIGNALS[name].compute(inputs) for name in COMBINED]
            for name, signal in zip(COMBINED, signals, strict=True):
                target.scores[keys, name][row] = signal.numpy()
            logs.append(logs_of(signals))
            drop = context.horizon_utility.drop
            samples.append(LayerSamples.of_logs(logs[-1], drop, context.reach() > 0))
        weights = fit_weights(samples[:n_fit])
        for context, of_signals, target in zip(contexts, logs, into, strict=True):
            score = Combination.apply(of_signals, weights) * (context.reach() > 0)
            target.scores[keys, COMBINATION][row] = score.numpy()

    def _read_through(self, keys: str, context: LayerContext) -> LayerContext:
        if keys == EXACT:
            return context
        n, layer = context.n_context, context.layer
        framed = round_trip(self.key_codes[keys], context.keys_framed[:n], layer)
        hat = self.frames.keys_from_frame(layer, framed, torch.arange(n))
        return replace(
            context,
            keys=torch.cat([hat, context.keys[n:]]),
            keys_framed=torch.cat([framed, context.keys_framed[n:]]),
        )
