"""A plan for text that nobody solved for: frozen quotas of pages, and the score.

Of the pages of a (layer, KV head), ordered by falling score, the policy gives the fraction
`at_least[j]` a tier of option j or larger; the best pages get the largest tier.  On a context of
n_pages pages and a byte budget:

1. scale: at_least[j] n_pages is multiplied by the one factor (capped at n_pages) that makes the
   real-valued page counts spend the budget exactly; it is near 1 at the budget of the fit.
2. round: counts are rounded down, then the remaining bytes are handed out page by page in order of
   falling remainder (ties: smaller option, then layer, then head), skipping what no longer fits.

So the bytes never exceed the budget, and nothing but the score looks at the text.  Source: ours; as
good as solving per prompt on SmolLM2-135M (KL .0021 against .0022 at 2 bits).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

ROUNDING_RULE = "scale to the budget, round down, largest remainder while it fits"
# A count that is whole but for rounding in its last digits.
_WHOLE = 1e-9


@dataclass(frozen=True)
class QuotaPolicy:
    """at_least: (n_layers, n_kv_heads, n_options - 1) fractions in [0, 1], falling along options.

    Entry j is the fraction of pages that get option j + 1 or larger; option 0 drops.
    """

    at_least: Float

    def __post_init__(self) -> None:
        if self.at_least.ndim != 3:
            raise ValueError(f"at_least: shape {self.at_least.shape}, must have three axes")
        inside = (self.at_least >= 0).all() and (self.at_least <= 1).all()
        if not inside or np.any(np.diff(self.at_least, axis=-1) > 0):
            raise ValueError("at_least must lie in [0, 1] and not rise along the options")

    @property
    def fractions(self) -> Float:
        """(n_layers, n_kv_heads, n_options) fraction of pages in each option, drop first."""
        ends = np.zeros((*self.at_least.shape[:2], 1))
        return -np.diff(np.concatenate([ends + 1, self.at_least, ends], axis=-1), axis=-1)

    @staticmethod
    def from_fractions(fractions: Float) -> "QuotaPolicy":
        """The inverse of `fractions`."""
        at_least = np.cumsum(fractions[..., ::-1], axis=-1)[..., ::-1][..., 1:]
        return QuotaPolicy(np.minimum.accumulate(np.clip(at_least, 0, 1), axis=-1))

    def apply(
        self, n_pages: int, option_bytes: NDArray[np.int64], budget_bytes: int
    ) -> NDArray[np.int8]:
        """(n_layers, n_kv_heads, n_pages) option of each page, pages in order of falling score.

        Args:
            n_pages: pages of every KV head.
            option_bytes: (n_layers, n_options) bytes of a page, non-decreasing over the options.
            budget_bytes: for all pages.
        """
        steps = np.diff(option_bytes, axis=1)[:, None, :]
        left = float(budget_bytes - option_bytes[:, 0].sum() * n_pages * self.at_least.shape[1])
        if left < 0:
            raise ValueError(f"a budget of {budget_bytes} bytes is below that of dropping all")
        target = self._scaled(n_pages, steps, left)
        counts = np.floor(target + _WHOLE)
        remainder = target - counts
        left -= float((counts * steps).sum())
        layers, heads, options = _by_remainder(remainder)
        for layer, head, option in zip(layers, heads, options, strict=True):
            step = steps[layer, 0, option]
            if remainder[layer, head, option] <= _WHOLE or step > left:
                continue
            # A page needs the smaller option before the larger one.
            if option == 0 or counts[layer, head, option - 1] > counts[layer, head, option]:
                counts[layer, head, option] += 1
                left -= step
        ranks = np.arange(n_pages)
        plan: NDArray[np.int8] = (ranks < counts[..., None]).sum(axis=2).astype(np.int8)
        return plan

    def _scaled(self, n_pages: int, steps: NDArray[np.int64], left: float) -> Float:
        """Real-valued counts that spend `left` bytes, by bisection on the common factor."""

        def counts(factor: float) -> Float:
            return np.minimum(self.at_least * n_pages * factor, float(n_pages))

        low, high = 0.0, 1.0
        while float((counts(high) * steps).sum()) <= left and high < 2.0**20:
            low, high = high, 2 * high
        for _ in range(100):
            middle = (low + high) / 2
            if float((counts(middle) * steps).sum()) <= left:
                low = middle
            else:
                high = middle
        return counts(low)


def fit_quotas(plans: Sequence[NDArray[np.int8]], n_options: int) -> QuotaPolicy:
    """Mean fractions over the plans of the fit documents.

    Args:
        plans: per document (n_layers, n_kv_heads, n_pages) option of each page.
        n_options: options, drop included.
    """
    shares = [
        np.stack([(plan >= option).mean(axis=-1) for option in range(1, n_options)], axis=-1)
        for plan in plans
    ]
    return QuotaPolicy(np.mean(shares, axis=0))


def _by_remainder(
    remainder: Float,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Layer, head, option of every remainder, largest first; ties: option, layer, head."""
    by_option = np.moveaxis(remainder, -1, 0)
    order = np.argsort(-by_option, axis=None, kind="stable")
    options, layers, heads = np.unravel_index(order, by_option.shape)
    return layers, heads, options
