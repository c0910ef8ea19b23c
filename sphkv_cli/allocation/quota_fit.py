"""What quotas are fitted from, kept so that they can be fitted again for another budget or length.

Of every fit document the calibrated costs of its pages by rank, not yet priced: a drop's

    sum_t u_drop(t)      and a tier's      sum_t u_key(t) ||e_k(t)||^2 + u_value(t) ||e_v(t)||^2

and the prices c_drop, c_code found at a few budgets.  At another budget the prices are interpolated
(logarithms, linear in the logarithm of bits per coordinate, constant beyond the ends), every fit
document is solved at it, and the quotas are the mean fractions.  Quotas of one budget that are
scaled to another cost 2 to 4 times as much on SmolLM2-135M; interpolated prices, 1 to 4 %.

At another length the curves of costs over ranks are stretched (`stretched`).  On SmolLM2-135M,
against quotas of the length itself, quotas of 512 tokens cost 1.1 to 1.2 times as much at 1,536 and
those of 1,536 tokens 0.9 to 1.03 times at 512; the same fractions of pages 1.2 to 1.4 times, and 27
to 109 times at 512, where the sink's page falls out (measured while the sink's cost still leaked
into the pages after it).  Source: ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sphkv_cli.allocation.layout import PageLayout
from sphkv_cli.allocation.page_costs import Coefficients
from sphkv_cli.allocation.pins import Pins
from sphkv_cli.allocation.policy import QuotaPolicy, fit_quotas
from sphkv_cli.allocation.solver import Plan, Solution, solve

Float = NDArray[np.float64]


@dataclass(frozen=True)
class BudgetPrices:
    """Prices by budget: rates (n_rates) bits per coordinate, rising; drop, code (n_rates, n_layers,
    n_kv_heads)."""

    rates: Float
    drop: Float
    code: Float

    def __post_init__(self) -> None:
        if not (np.diff(self.rates) > 0).all() or not (self.rates > 0).all():
            raise ValueError("rates must be positive and rise")
        if self.drop.shape != self.code.shape or len(self.drop) != len(self.rates):
            raise ValueError("there must be prices of drops and of codes at every rate")

    @staticmethod
    def of(found: Sequence[tuple[float, Coefficients]]) -> "BudgetPrices":
        """From (bits per coordinate, prices) in any order."""
        ordered = sorted(found, key=lambda one: one[0])
        return BudgetPrices(
            np.array([rate for rate, _ in ordered]),
            np.stack([prices.drop for _, prices in ordered]),
            np.stack([prices.code for _, prices in ordered]),
        )

    def at(self, rate: float) -> Coefficients:
        """Interpolated."""
        logs = np.log(self.rates)
        place = float(np.interp(np.log(rate), logs, np.arange(logs.size)))
        low = min(int(place), logs.size - 1)
        high, share = min(low + 1, logs.size - 1), place - low

        def mix(prices: Float) -> Float:
            mixed: Float = prices[low] ** (1 - share) * prices[high] ** share
            return mixed

        return Coefficients(mix(self.drop), mix(self.code))


@dataclass(frozen=True, eq=False)
class QuotaFit:
    """pages: per fit document (n_layers, n_kv_heads, n_pages, n_options) unpriced costs by falling
    score, option 0 drops; prices: by budget."""

    pages: tuple[NDArray[np.float32], ...]
    prices: BudgetPrices

    def quotas(
        self,
        layout: PageLayout,
        coefficients: Coefficients,
        budget_bytes: int,
        n_context: int,
        pins: Pins,
    ) -> QuotaPolicy:
        """Fitted for contexts of n_context tokens; of the pages that are not pinned.

        Args:
            budget_bytes: for the pages.

        Raises:
            InfeasibleBudgetError: it is below what must be kept.
        """
        n_pages = layout.n_pages(n_context)
        n_pinned = pins.n_pages(layout.page_size, n_context)
        if n_pinned == n_pages:
            heads = (layout.n_layers, layout.n_kv_heads)
            return QuotaPolicy(np.ones((*heads, len(layout.tiers))))
        plans = [
            solve_pages(
                priced(stretched(pages, n_pages, max(n_pinned, 1)), coefficients),
                layout,
                budget_bytes,
                pins,
                n_context,
            )[0][:, :, n_pinned:]
            for pages in self.pages
        ]
        return fit_quotas(plans, len(layout.option_names))


def priced(pages: NDArray[np.floating], coefficients: Coefficients) -> Float:
    """Costs (n_layers, n_kv_heads, n_pages, n_options) at prices."""
    costs = pages.astype(np.float64)
    costs[..., 0] *= coefficients.drop[..., None]
    costs[..., 1:] *= coefficients.code[..., None, None]
    return costs


def stretched(pages: NDArray[np.floating], n_pages: int, n_fixed: int = 1) -> Float:
    """The costs of a context of another length, by rank.

    The first n_fixed pages stay as they are: the sink is one page however long the context is.  The
    others lie at the same shares of what follows, between its old pages by the logarithms.
    """
    known, ranks = pages.shape[2], np.arange(n_pages)
    n_fixed = min(n_fixed, known)
    ratio = (known - n_fixed) / max(n_pages - n_fixed, 1)
    place = np.maximum(n_fixed - 0.5 + (ranks - n_fixed + 0.5) * ratio, n_fixed)
    place = np.clip(np.where(ranks < n_fixed, ranks, place), 0, known - 1)
    low = place.astype(np.int64)
    high, share = np.minimum(low + 1, known - 1), (place - low)[:, None]
    logs = np.log(np.maximum(pages.astype(np.float64), 1e-300))
    found: Float = np.exp((1 - share) * logs[:, :, low] + share * logs[:, :, high])
    return pages.astype(np.float64) if known == n_pages else found


def solve_pages(
    costs: Float, layout: PageLayout, budget_bytes: int, pins: Pins, n_context: int
) -> tuple[NDArray[np.int8], Solution]:
    """Options (n_layers, n_kv_heads, n_pages) of pages by falling score, and the solver's word.

    Args:
        costs: (n_layers, n_kv_heads, n_pages, n_options), priced.
        budget_bytes: for the pages.

    Raises:
        InfeasibleBudgetError: it is below what must be kept.
    """
    first, n_options = int(pins.no_drop), costs.shape[-1]
    n_pinned = pins.n_pages(layout.page_size, n_context)
    free = costs[:, :, n_pinned:, first:]
    sizes = np.broadcast_to(layout.option_bytes()[:, None, None, first:], free.shape)
    pinned_bytes = n_pinned * layout.n_kv_heads * int(layout.option_bytes()[:, -1].sum())
    options = np.full(costs.shape[:3], n_options - 1, dtype=np.int8)
    if not free.size:
        # Nothing is left to choose.
        cost = float(costs[..., -1].sum())
        plan = Plan(options.ravel(), cost, pinned_bytes)
        return options, Solution(plan, budget_bytes, cost, cost, 0.0, None, np.inf, 0)
    solution = solve(
        free.reshape(-1, free.shape[-1]),
        sizes.reshape(-1, free.shape[-1]),
        budget_bytes - pinned_bytes,
    )
    options[:, :, n_pinned:] = first + solution.plan.option_of_item.reshape(free.shape[:3])
    pinned_cost = float(costs[:, :, :n_pinned, -1].sum())
    whole = replace(
        solution,
        plan=replace(solution.plan, cost=solution.plan.cost + pinned_cost),
        greedy_cost=solution.greedy_cost + pinned_cost,
        dual_bound=solution.dual_bound + pinned_cost,
        uniform_cost=solution.uniform_cost + pinned_cost,
    )
    return options, whole


def apply_quotas(
    policy: QuotaPolicy, layout: PageLayout, budget_bytes: int, pins: Pins, n_context: int
) -> NDArray[np.int8]:
    """Options (n_layers, n_kv_heads, n_pages) of the pages of a context by falling score.

    Args:
        policy: of the pages that are not pinned.
        budget_bytes: for the pages.
    """
    sizes, first = layout.option_bytes(), int(pins.no_drop)
    n_pages, n_pinned = layout.n_pages(n_context), pins.n_pages(layout.page_size, n_context)
    shape = (layout.n_layers, layout.n_kv_heads, n_pages)
    options = np.full(shape, sizes.shape[1] - 1, dtype=np.int8)
    if n_pinned < n_pages:
        pinned_bytes = n_pinned * layout.n_kv_heads * int(sizes[:, -1].sum())
        rest = QuotaPolicy(policy.at_least[..., first:])
        free = rest.apply(n_pages - n_pinned, sizes[:, first:], budget_bytes - pinned_bytes)
        options[:, :, n_pinned:] = first + free
    return options
