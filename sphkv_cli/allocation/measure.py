"""What one document tells: scores, encode errors of every tier, and (where allowed) its future.

The future is measured on fit documents, to calibrate, and on select documents, to check; of a judge
document the context alone is read (but by the oracle).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sphkv_cli.allocation.coding import CodedContext, TierFormats
from sphkv_cli.allocation.context import LayerContext, Split, read_context
from sphkv_cli.allocation.estimators import UtilityEstimator
from sphkv_cli.allocation.output_error import HorizonAttention
from sphkv_cli.allocation.page_costs import TierErrors, Utilities
from sphkv_cli.artifacts.capture import CaptureReader, DocumentInfo
from sphkv_cli.progress import Progress
from sphkv_codebooks.frame import FrameSet

Float = NDArray[np.float64]


@dataclass(frozen=True)
class MeasuredDocument:
    """Everything the allocator keeps of one document.

    scores: (n_layers, n_kv_heads, n_context); window: what the window's queries would suffer,
    uncalibrated; horizon: what the horizon's did, None where it may not be looked at;
    output_errors: (n_tiers, n_layers, n_kv_heads) measured with every token in one tier, or None.
    """

    info: DocumentInfo
    split: Split
    errors: TierErrors
    scores: Float
    window: Utilities
    horizon: Utilities | None
    output_errors: Float | None

    @property
    def n_context(self) -> int:
        return self.split.n_context


def measure_document(
    capture: CaptureReader,
    document: DocumentInfo,
    split: Split,
    frames: FrameSet,
    formats: TierFormats,
    estimator: UtilityEstimator,
    head_weights: Tensor,
    *,
    with_horizon: bool,
    with_output_errors: bool = False,
    progress: Progress,
) -> MeasuredDocument:
    """Measure one document, layer by layer; advances progress by one per layer.

    Args:
        head_weights: (n_layers, n_q_heads) F.
        with_horizon: also measure the true future (fit and select documents).
        with_output_errors: also the output error of every token in one tier.

    Raises:
        SphkvError: NaN or Inf in the capture, or a vector that a tier cannot encode.
    """
    shape = (capture.n_layers, capture.n_kv_heads, split.n_context)
    found = Measurement(shape, formats, with_horizon=with_horizon)
    output_errors = np.empty((formats.n_tiers, *shape[:2]))
    for layer in range(capture.n_layers):
        context = read_context(capture, document, layer, split, frames, head_weights[layer])
        coded = found.add(context, estimator)
        if with_output_errors:
            horizon_attention = HorizonAttention.of(context)
            for tier in range(formats.n_tiers):
                error = horizon_attention.output_error(*coded.of_tier(tier))
                output_errors[tier, layer] = error.numpy()
        progress.advance()
    return found.document(document, split, output_errors if with_output_errors else None)


class Measurement:
    """The arrays of one document while its layers come in, each once and in any order.

    Args:
        shape: (n_layers, n_kv_heads, n_context).
        with_horizon: also the true future.
    """

    def __init__(
        self, shape: tuple[int, int, int], formats: TierFormats, *, with_horizon: bool
    ) -> None:
        self._formats = formats
        self._scores = np.empty(shape)
        self._window = _empty_utilities(shape)
        self._horizon = _empty_utilities(shape) if with_horizon else None
        self._key_errors = np.empty((len(formats.key_formats), *shape), dtype=np.float32)
        self._value_errors = np.empty((len(formats.value_formats), *shape), dtype=np.float32)

    def add(self, context: LayerContext, estimator: UtilityEstimator) -> CodedContext:
        """Measure one layer; returns its context as the tiers give it back."""
        layer, n_context = context.layer, context.n_context
        self._scores[layer] = estimator.score(context).cpu().numpy()
        reach = context.reach()
        for name in ("key", "value", "drop"):
            seen = getattr(context.window_utility, name) * reach
            getattr(self._window, name)[layer] = seen.cpu().numpy()
            if self._horizon is not None:
                true = getattr(context.horizon_utility, name)
                getattr(self._horizon, name)[layer] = true.cpu().numpy()
        keys, values = context.keys_framed[:n_context], context.values_framed[:n_context]
        coded = CodedContext.encode(keys, values, self._formats, layer)
        for errors, exact, hats in (
            (self._key_errors, keys, coded.keys),
            (self._value_errors, values, coded.values),
        ):
            for index, hat in enumerate(hats):
                errors[index, layer] = (hat - exact).square_().sum(-1).T.cpu().numpy()
        return coded

    def document(
        self, info: DocumentInfo, split: Split, output_errors: Float | None = None
    ) -> MeasuredDocument:
        """What was measured."""
        formats = self._formats
        return MeasuredDocument(
            info,
            split,
            TierErrors(
                self._key_errors, self._value_errors, formats.key_of_tier, formats.value_of_tier
            ),
            self._scores,
            self._window,
            self._horizon,
            output_errors,
        )


def _empty_utilities(shape: tuple[int, ...]) -> Utilities:
    return Utilities(np.empty(shape), np.empty(shape), np.empty(shape))
