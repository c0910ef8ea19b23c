"""How much more a set of drops hurts than the sum of its parts, fitted per (layer, KV head).

    c = measured output error of dropping the planned set / sum of what each drop alone would do

Errors of dropped tokens share a direction, so c is above 1, and it depends on the set, which
depends on c.  We start from a constant and go half way (in logarithms) to the ratio found on the
fit documents, plan again, and repeat.  A head's ratio is shrunk towards its layer's, and a layer's
towards that of all, by one head's (one layer's) mean worth of evidence: a set that hardly hurts
says little about c.  Source: ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sphkv_cli.allocation.context import read_context
from sphkv_cli.allocation.measure import MeasuredDocument
from sphkv_cli.allocation.output_error import HorizonAttention
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.progress import Progress
from sphkv_codebooks.frame import FrameSet

Float = NDArray[np.float64]

START = 8.0
"""The constant that fits SmolLM2-135M best; every fit starts from it."""
ITERATIONS = 3
LEAST, MOST = 1.0, 1000.0
"""Bounds of a fitted coefficient."""


@dataclass(frozen=True)
class DropCoherence:
    """Of one or more documents, each (n_layers, n_kv_heads): measured, and summed over tokens."""

    measured: Float
    summed: Float

    @staticmethod
    def total(parts: Sequence["DropCoherence"]) -> "DropCoherence":
        """Over documents."""
        return DropCoherence(
            np.sum([part.measured for part in parts], axis=0),
            np.sum([part.summed for part in parts], axis=0),
        )

    def ratios(self) -> Float:
        """Shrunk ratios, (n_layers, n_kv_heads); all NaN where nothing was dropped."""
        if not self.summed.sum() > 0:
            return np.full(self.summed.shape, np.nan)
        n_kv_heads = self.summed.shape[1]
        overall = self.measured.sum() / self.summed.sum()
        of_layer = self.summed.sum(axis=1)
        one_layer = of_layer.mean()
        layer = (self.measured.sum(axis=1) + overall * one_layer) / (of_layer + one_layer)
        # A layer that drops nothing has no evidence of its own: any weight gives it the layer's.
        one_head = np.where(of_layer > 0, of_layer / n_kv_heads, 1.0)[:, None]
        found: Float = (self.measured + layer[:, None] * one_head) / (self.summed + one_head)
        return found

    def updated(self, coefficients: Float) -> Float:
        """Half way from `coefficients` to the ratios, in logarithms."""
        ratios = self.ratios()
        if np.isnan(ratios).all():
            return coefficients
        steps = np.sqrt(coefficients * np.clip(ratios, LEAST, MOST))
        return np.clip(steps, LEAST, MOST)


def measure_drops(
    capture: CaptureReader,
    document: MeasuredDocument,
    frames: FrameSet,
    option_of_token: NDArray[np.int8],
    head_weights: Tensor,
    progress: Progress,
) -> DropCoherence:
    """Really drop what a plan drops, and nothing else; one step of progress per layer.

    Args:
        document: measured with its horizon.
        option_of_token: (n_layers, n_kv_heads, n_context), 0 = dropped.
    """
    assert document.horizon is not None
    dropped = option_of_token == 0
    measured = np.zeros(dropped.shape[:2])
    for layer in range(capture.n_layers):
        if dropped[layer].any():
            context = read_context(
                capture, document.info, layer, document.split, frames, head_weights[layer]
            )
            n = document.n_context
            measured[layer] = (
                HorizonAttention.of(context)
                .output_error(
                    context.keys_framed[:n],
                    context.values_framed[:n],
                    torch.from_numpy(dropped[layer].T.copy()),
                )
                .numpy()
            )
        progress.advance()
    summed = np.where(dropped, document.horizon.drop, 0.0).sum(axis=-1)
    return DropCoherence(measured, summed)
