"""Which tokens leave the dense tail, when, and into which tier: the two rules.

policy   the whole prompt is placed by the allocation's scores and quotas when it has been read;
         later tokens stay dense until a page of them waits beyond `window`, then the oldest are
         sealed in the largest tier that keeps the budget's bits per coordinate
uniform  one tier for everything but the first tokens (dense for good) and the last `window`;
         whatever fills a page beyond the window is sealed, in the prompt and after it alike

Every seal plans a layer's decode anew, which takes longer the more pages there are: a cache of n
sealed tokens waits for n / 128 more before it seals again (a page below 128 pages).

Source: ours; paging after vLLM (arXiv 2309.06180), the dense window after KIVI.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sphkv_cli.errors import UsageError
from sphkv_cli.generation.budget_keeper import BudgetKeeper
from sphkv_cli.generation.context_policy import ContextPolicy
from sphkv_cli.generation.placed_tokens import Placement
from sphkv_codebooks.frame import FrameSet
from sphkv_kernels.tier import TierFormat

_TAIL_SHARE = 128


@dataclass(frozen=True, eq=False)
class PlacementRule(ABC):
    """Decides for one sequence in one layer; tiers: those that placements index."""

    tiers: tuple[TierFormat, ...]
    page_size: int
    frames: FrameSet

    @abstractmethod
    def asked_tokens(self, n_prompt: int) -> Tensor:
        """(n) int64, ascending: the prompt's tokens whose queries `place_prompt` wants to see."""

    @abstractmethod
    def place_prompt(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor
    ) -> Placement | None:
        """Arguments as `ContextPolicy.place`; None leaves the prompt in the tail."""

    def tokens_per_seal(self, n_sealed: int) -> int:
        """Tokens that wait beyond the window before n_sealed others get company: whole pages."""
        return max(n_sealed // (_TAIL_SHARE * self.page_size), 1) * self.page_size

    def pages_due(self, n_sealed: int, n_waiting: int) -> int:
        """Full pages of n_waiting tokens beyond the window, or 0 while they are too few."""
        return n_waiting // self.page_size * (n_waiting >= self.tokens_per_seal(n_sealed))

    @property
    @abstractmethod
    def later_tier(self) -> int:
        """The tier of tokens that are sealed after the prompt."""

    @abstractmethod
    def steady_pages(self, n_tail: int) -> int:
        """Pages of `later_tier` that a tail owes where sealing costs next to nothing."""

    @abstractmethod
    def is_steady(self, n_sealed: int) -> bool:
        """Whether every later seal is whole pages of `later_tier`, after n_sealed tokens were."""

    @abstractmethod
    def place_later(self, n_sealed: int, n_tail: int, n_kv_heads: int) -> Placement | None:
        """What of a tail of n_tail tokens is sealed after n_sealed others were; None: nothing."""


@final
@dataclass(frozen=True, eq=False)
class PolicyRule(PlacementRule):
    """window: tokens after the prompt that stay dense at least; None: all of them do.

    keeper: decides about pages after the prompt, so that a budget holds; without one they go to
    `later_tier` and nothing is demoted.
    """

    policy: ContextPolicy
    window: int | None
    keeper: BudgetKeeper | None

    @staticmethod
    def of(
        policy: ContextPolicy, window: int | None = 32, keeper: BudgetKeeper | None = None
    ) -> "PolicyRule":
        """The rule of a policy.

        Raises:
            UsageError: a negative window.
        """
        _check_window(window)
        layout = policy.layout
        return PolicyRule(layout.tiers, layout.page_size, policy.frames, policy, window, keeper)

    def asked_tokens(self, n_prompt: int) -> Tensor:
        return self.policy.asked_tokens(n_prompt)

    @property
    def later_tier(self) -> int:
        """The largest tier whose page keeps the budget's bits per coordinate (of 4096 tokens)."""
        layout = self.policy.layout
        n_tokens = 4096
        rate = self.policy.budget_bytes(n_tokens) / layout.n_coordinates(n_tokens)
        most = rate * 2 * layout.head_dim * layout.page_size
        return max(int((layout.tier_bytes() <= most).sum()) - 1, 0)

    def place_prompt(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor
    ) -> Placement | None:
        if not self.policy.can_place(keys.shape[0]):
            return None
        return Placement(*self.policy.place(layer, queries, keys, values, positions))

    def steady_pages(self, n_tail: int) -> int:
        if self.window is None or self.keeper is not None:
            return 0
        return max(n_tail - self.window, 0) // self.page_size

    def kept_pages(self, n_sealed: int, n_tail: int) -> int:
        """Pages of a tail about which the keeper is asked by now."""
        return 0 if self.window is None else self.pages_due(n_sealed, n_tail - self.window)

    def is_steady(self, n_sealed: int) -> bool:
        return True

    def place_later(self, n_sealed: int, n_tail: int, n_kv_heads: int) -> Placement | None:
        if self.window is None:
            return None
        n_pages = self.pages_due(n_sealed, n_tail - self.window)
        return _pages(n_pages, self.page_size, self.later_tier, n_kv_heads) if n_pages else None


@final
@dataclass(frozen=True, eq=False)
class UniformRule(PlacementRule):
    """Tier 0 for all tokens but the first ones, which go to a page of tier 1, and the window."""

    window: int
    first_tokens: int

    @staticmethod
    def of(
        tier: TierFormat,
        frames: FrameSet,
        *,
        page_size: int = 32,
        window: int = 32,
        first_tokens: int = 4,
    ) -> "UniformRule":
        """The rule of one tier.

        Raises:
            UsageError: a negative window, or first tokens that do not fit a page.
        """
        _check_window(window)
        if not 0 <= first_tokens <= page_size:
            raise UsageError(f"first_tokens is {first_tokens}", f"give 0 to {page_size}, a page")
        tiers = (tier, TierFormat.dense()) if first_tokens else (tier,)
        return UniformRule(tiers, page_size, frames, window, first_tokens)

    def asked_tokens(self, n_prompt: int) -> Tensor:
        return torch.arange(0)

    def place_prompt(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor
    ) -> Placement | None:
        return self.place_later(0, keys.shape[0], keys.shape[1])

    def place_later(self, n_sealed: int, n_tail: int, n_kv_heads: int) -> Placement | None:
        first = 0 if n_sealed else self.first_tokens
        n_pages = self.pages_due(n_sealed, n_tail - self.window - first)
        if not n_pages:
            return None
        pages = _pages(n_pages, self.page_size, 0, n_kv_heads)
        if not first:
            return pages
        heads = (first, n_kv_heads)
        return Placement(
            torch.cat([torch.full(heads, 1, dtype=torch.int8), pages.tier_of_token]),
            torch.cat([torch.full(heads, n_pages, dtype=torch.int32), pages.page_of_token]),
        )

    @property
    def later_tier(self) -> int:
        return 0

    def steady_pages(self, n_tail: int) -> int:
        return max(n_tail - self.window, 0) // self.page_size

    def is_steady(self, n_sealed: int) -> bool:
        return n_sealed > 0 or not self.first_tokens

    def n_sealed(self, n_tokens: int) -> int:
        """How many of n_tokens read at once lie on pages; in portions too, below 128 pages."""
        placed = self.place_later(0, n_tokens, 1)
        return 0 if placed is None else placed.n_placed


def _pages(n_pages: int, page_size: int, tier: int, n_kv_heads: int) -> Placement:
    """Tokens in order, page after page, all heads alike."""
    numbers = torch.arange(n_pages * page_size, dtype=torch.int32) // page_size
    page_of_token = numbers[:, None].expand(-1, n_kv_heads)
    return Placement(torch.full(page_of_token.shape, tier, dtype=torch.int8), page_of_token)


def _check_window(window: int | None) -> None:
    if window is not None and window < 0:
        raise UsageError(f"window is {window}", "give 0 or more tokens")
