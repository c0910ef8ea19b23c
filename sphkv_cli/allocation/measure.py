"""What one document tells: scores, encode errors of every tier, and (where allowed) its future.

Errors are made, not modelled: every key and value of the context goes through the encoder and the
decoder of every tier, in its frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sphkv_cli.allocation.context import LayerContext, Split, read_context
from sphkv_cli.allocation.estimators import UtilityEstimator
from sphkv_cli.allocation.page_costs import TierErrors, Utilities
from sphkv_cli.artifacts.capture import CaptureReader, DocumentInfo
from sphkv_cli.errors import SphkvError
from sphkv_cli.progress import Progress
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.tier import RegionFormat, TierFormat
from sphkv_kernels.vectors import decode_vectors, encode_vectors

Float = NDArray[np.float64]


@dataclass(frozen=True)
class TierFormats:
    """Distinct key and value formats of a list of tiers, so that each is encoded once."""

    key_formats: tuple[RegionFormat, ...]
    value_formats: tuple[RegionFormat, ...]
    key_of_tier: tuple[int, ...]
    value_of_tier: tuple[int, ...]

    @staticmethod
    def of(tiers: Sequence[TierFormat]) -> "TierFormats":
        """Formats in order of first use."""
        keys, key_of_tier = _distinct([tier.key_format for tier in tiers])
        values, value_of_tier = _distinct([tier.value_format for tier in tiers])
        return TierFormats(keys, values, key_of_tier, value_of_tier)


@dataclass(frozen=True)
class MeasuredDocument:
    """Everything the allocator keeps of one document.

    scores: (n_layers, n_kv_heads, n_context); window: what the window's queries would suffer,
    uncalibrated; horizon: what the horizon's did, None where it may not be looked at.
    """

    info: DocumentInfo
    split: Split
    errors: TierErrors
    scores: Float
    window: Utilities
    horizon: Utilities | None

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
    progress: Progress,
) -> MeasuredDocument:
    """Measure one document, layer by layer; advances progress by one per layer.

    Args:
        head_weights: (n_layers, n_q_heads) F.
        with_horizon: also measure the true future (fit and select documents).

    Raises:
        SphkvError: NaN or Inf in the capture, or a vector that a tier cannot encode.
    """
    shape = (capture.n_layers, capture.n_kv_heads, split.n_context)
    scores = np.empty(shape)
    window = _empty_utilities(shape)
    horizon = _empty_utilities(shape) if with_horizon else None
    key_errors = np.empty((len(formats.key_formats), *shape), dtype=np.float32)
    value_errors = np.empty((len(formats.value_formats), *shape), dtype=np.float32)
    for layer in range(capture.n_layers):
        context = read_context(capture, document, layer, split, frames, head_weights[layer])
        scores[layer] = estimator.score(context).numpy()
        reach = context.reach()
        for name in ("key", "value", "drop"):
            getattr(window, name)[layer] = getattr(context.window_utility, name) * reach
            if horizon is not None:
                getattr(horizon, name)[layer] = getattr(context.horizon_utility, name)
        for errors, kinds, vectors in (
            (key_errors, formats.key_formats, context.keys_framed),
            (value_errors, formats.value_formats, context.values_framed),
        ):
            vectors = vectors[: split.n_context]
            for index, kind in enumerate(kinds):
                difference = round_trip(kind, vectors, context) - vectors
                errors[index, layer] = (difference**2).sum(-1).T.numpy()
        progress.advance()
    tier_errors = TierErrors(key_errors, value_errors, formats.key_of_tier, formats.value_of_tier)
    return MeasuredDocument(document, split, tier_errors, scores, window, horizon)


def round_trip(kind: RegionFormat, vectors: Tensor, context: LayerContext) -> Tensor:
    """Encode and decode vectors (..., head_dim) in the frame; float32.

    Raises:
        SphkvError: a vector that the format cannot hold; names format and layer.
    """
    try:
        return decode_vectors(kind, encode_vectors(kind, vectors)).to(torch.float32)
    except (CodeError, ValueError) as error:
        name = kind.name if isinstance(kind, SphericalCode) else kind
        raise SphkvError(
            f"{name} cannot encode layer {context.layer}: {error}",
            "leave this tier out, or check the capture",
        ) from error


def _empty_utilities(shape: tuple[int, ...]) -> Utilities:
    return Utilities(np.empty(shape), np.empty(shape), np.empty(shape))


def _distinct(
    kinds: Sequence[RegionFormat],
) -> tuple[tuple[RegionFormat, ...], tuple[int, ...]]:
    found: dict[str, tuple[int, RegionFormat]] = {}
    index: list[int] = []
    for kind in kinds:
        key = kind.digest if isinstance(kind, SphericalCode) else kind
        found.setdefault(key, (len(found), kind))
        index.append(found[key][0])
    return tuple(kind for _, kind in found.values()), tuple(index)
