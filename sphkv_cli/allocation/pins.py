"""Tokens that are kept whatever they score: the first, the last, or all of them in some tier.

Pinned tokens come first in the order of every (layer, KV head), fill the first pages of it
together, and those pages take the largest tier; the rest of the budget is solved for as ever.
Without pins everything competes, which is the default: on SmolLM2-135M the solver finds the sink
and the recent tokens by itself, and pinning 4 + 32 tokens costs more than it saves.  Source: ours;
the pins are those of StreamingLLM and SnapKV.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sphkv_cli.allocation.budget import least_budget
from sphkv_cli.allocation.layout import PageLayout
from sphkv_cli.errors import UsageError
from sphkv_cli.option_checks import require_at_least

Float = NDArray[np.float64]

NO_PINS = "nothing"


@dataclass(frozen=True)
class Pins:
    """first, last: tokens at either end of the context that stay in the largest tier; no_drop: no
    token is dropped."""

    first: int = 0
    last: int = 0
    no_drop: bool = False

    def __post_init__(self) -> None:
        require_at_least("--pin-first", self.first, 0)
        require_at_least("--pin-last", self.last, 0)

    def n_pages(self, page_size: int, n_context: int) -> int:
        """Pages of one KV head that hold pinned tokens."""
        return -(-min(self.first + self.last, n_context) // page_size)

    def lifted(self, scores: Float) -> Float:
        """Scores (.., n_context) by which tokens are ordered: pinned ones above all others."""
        if not self.first + self.last:
            return scores
        lifted = scores.copy()
        lifted[..., : self.first] = np.inf
        lifted[..., max(scores.shape[-1] - self.last, 0) :] = np.inf
        return lifted

    def minimum_bytes(self, layout: PageLayout, n_context: int) -> int:
        """Bytes that no plan of a context goes below."""
        n_pinned = self.n_pages(layout.page_size, n_context)
        sizes = layout.option_bytes().sum(axis=0) * layout.n_kv_heads
        smallest = int(sizes[int(self.no_drop)])
        others = (layout.n_pages(n_context) - n_pinned) * smallest
        return layout.overhead_bytes() + n_pinned * int(sizes[-1]) + others

    def require(self, layout: PageLayout, n_context: int, budget_bytes: int, document: str) -> None:
        """Raise UsageError where the budget cannot pay for what must be kept."""
        minimum = self.minimum_bytes(layout, n_context)
        if budget_bytes >= minimum:
            return
        n_coordinates = layout.n_coordinates(n_context)
        raise UsageError(
            f"{self.describe()} of {document} take {minimum:,} bytes = "
            f"{8 * minimum / n_coordinates:.3g} bits per coordinate, the budget is "
            f"{budget_bytes:,} bytes",
            "pin fewer tokens, allow drops, or give a budget of at least "
            f"{least_budget(minimum, n_coordinates)}",
        )

    def describe(self) -> str:
        """In words."""
        ends = [f"the {n} {end}" for n, end in ((self.first, "first"), (self.last, "last")) if n]
        said = [f"{' and '.join(ends)} tokens"] if ends else []
        if self.no_drop:
            said.append("all tokens in some tier")
        return " and ".join(said) or NO_PINS
