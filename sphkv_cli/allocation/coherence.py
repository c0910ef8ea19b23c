"""How much more a planned set of errors hurts than the sum of its parts, per (layer, KV head).

    c = measured output error of the planned set / sum of what each token alone would do

for two sets: the dropped tokens (nothing coded), and the coded ones (nothing dropped).  Errors of
dropped tokens share a direction, so their c is above 1; coding errors add up incoherently, but in
layers where many tokens carry nearly the same vector they do not (c > 1), and where attention
saturates the first-order sum is too large (c < 1).  c depends on the set, which depends on c: we
start from constants, go half way (in logarithms) to the ratios found on the fit documents, plan
again, and repeat.  A head's ratio is shrunk towards its layer's, and a layer's towards that of all,
by one head's (one layer's) mean worth of evidence: a set that hardly hurts says little.
Source: ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sphkv_cli.allocation.coding import code_tokens
from sphkv_cli.allocation.context import read_context
from sphkv_cli.allocation.measure import MeasuredDocument
from sphkv_cli.allocation.output_error import HorizonAttention
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.progress import Progress
from sphkv_codebooks.frame import FrameSet
from sphkv_kernels.tier import TierFormat

Float = NDArray[np.float64]

DROP_START, CODE_START = 8.0, 1.0
"""Where fits start: the constant that fits SmolLM2-135M best, and independent errors."""
ITERATIONS = 3
DROP_BOUNDS, CODE_BOUNDS = (1.0, 1000.0), (1 / 32, 32.0)
"""Bounds of fitted coefficients."""


@dataclass(frozen=True)
class Coherence:
    """Of one or more documents, each (n_layers, n_kv_heads): measured, and summed over tokens."""

    measured: Float
    summed: Float

    @staticmethod
    def total(parts: Sequence["Coherence"]) -> "Coherence":
        """Over documents."""
        return Coherence(
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

    def updated(self, coefficients: Float, bounds: tuple[float, float]) -> Float:
        """Half way from `coefficients` to the ratios, in logarithms."""
        ratios = self.ratios()
        if np.isnan(ratios).all():
            return coefficients
        return np.clip(np.sqrt(coefficients * np.clip(ratios, *bounds)), *bounds)


@dataclass(frozen=True)
class PlanCoherence:
    """Of what a plan drops, and of what it codes."""

    drops: Coherence
    codes: Coherence

    @staticmethod
    def total(parts: Sequence["PlanCoherence"]) -> "PlanCoherence":
        """Over documents."""
        return PlanCoherence(
            Coherence.total([part.drops for part in parts]),
            Coherence.total([part.codes for part in parts]),
        )


def measure_coherence(
    capture: CaptureReader,
    document: MeasuredDocument,
    frames: FrameSet,
    tiers: Sequence[TierFormat],
    option_of_token: NDArray[np.int8],
    head_weights: Tensor,
    progress: Progress,
) -> PlanCoherence:
    """Really drop what a plan drops, and really code what it codes; one step per layer.

    Args:
        document: measured with its horizon.
        option_of_token: (n_layers, n_kv_heads, n_context), 0 = dropped.
    """
    future = document.horizon
    assert future is not None
    dropped = option_of_token == 0
    drops, codes = np.zeros(dropped.shape[:2]), np.zeros(dropped.shape[:2])
    coded_sums = np.zeros(dropped.shape[:2])
    for layer in range(capture.n_layers):
        context = read_context(
            capture, document.info, layer, document.split, frames, head_weights[layer]
        )
        n = document.n_context
        keys, values = context.keys_framed[:n], context.values_framed[:n]
        attention = HorizonAttention.of(context)
        option = torch.from_numpy(option_of_token[layer].T.copy())
        drops[layer] = attention.output_error(keys, values, option == 0).numpy()
        coded = code_tokens(keys, values, tiers, option, layer)
        codes[layer] = attention.output_error(*coded).numpy()
        for tier in range(len(tiers)):
            cost = document.errors.token_costs(tier, layer, future)
            coded_sums[layer] += np.where(option_of_token[layer] == tier + 1, cost, 0).sum(axis=-1)
        progress.advance()
    summed = np.where(dropped, future.drop, 0.0).sum(axis=-1)
    return PlanCoherence(Coherence(drops, summed), Coherence(codes, coded_sums))
