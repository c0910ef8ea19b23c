"""What an allocation must beat at the same bytes.

uniform: one tier for every token; uniform + sink page: the same with the first page of the context
(the attention sink) in a larger tier in every head, the honest baseline: token 0 alone is most of
the loss of a uniform tier.  Of each the tiers of least predicted cost that fit are
taken; dropping everything is no baseline.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sphkv_cli.allocation.layout import LaidOutBytes, PageLayout

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Baseline:
    """A plan that ignores scores.

    option, sink_option: of the layout's options, for all tokens and for those of the first page.
    option_of_token: (n_context) int8, the same in every layer and head.
    cost: predicted, as the plan's; laid_out: its bytes.
    """

    option: int
    sink_option: int
    option_of_token: NDArray[np.int8]
    cost: float
    laid_out: LaidOutBytes

    def per_head(self, layout: PageLayout) -> NDArray[np.int8]:
        """(n_layers, n_kv_heads, n_context)."""
        shape = (layout.n_layers, layout.n_kv_heads, self.option_of_token.size)
        return np.broadcast_to(self.option_of_token, shape)

    def describe(self, layout: PageLayout) -> str:
        """Names of its tiers."""
        name = layout.option_names[self.option]
        if self.sink_option == self.option:
            return name
        return f"{name}, first page {layout.option_names[self.sink_option]}"


def best_uniform(
    token_costs: Float, layout: PageLayout, budget_bytes: int, *, sink_page: bool
) -> Baseline | None:
    """The uniform plan of least cost within the budget, or None where none fits.

    Args:
        token_costs: (n_options, n_context), summed over layers and heads.
        budget_bytes: everything laid out.
        sink_page: the first page_size tokens may be in a larger tier.
    """
    n_options, n_context = token_costs.shape
    found: list[Baseline] = []
    for option in range(1, n_options):
        for sink_option in range(option, n_options if sink_page else option + 1):
            plan = np.full(n_context, option, dtype=np.int8)
            plan[: layout.page_size] = sink_option
            pages = plan[:: layout.page_size]
            shape = (layout.n_layers, layout.n_kv_heads, pages.size)
            laid_out = layout.measure(np.broadcast_to(pages, shape), n_context)
            if laid_out.total <= budget_bytes:
                cost = float(token_costs[plan, np.arange(n_context)].sum())
                found.append(Baseline(option, sink_option, plan, cost, laid_out))
    return min(found, key=lambda baseline: baseline.cost, default=None)
