"""Items of the allocation: pages of tokens of like score, and what each tier costs them.

Inside a (layer, KV head) tokens are sorted by falling score (ties by position) and cut into pages
of page_size, so that a page is tier-homogeneous and needs no padding but in the last one.  With u
the expected damage per token (attention_utility.py, calibration.py) and e the errors that encoding
really made, a page costs

    tier:  c_code sum_t u_key(t) ||e_k(t)||^2 + u_value(t) ||e_v(t)||^2
    drop:  c_drop sum_t u_drop(t)

c_drop stands for the coherence of dropped tokens, whose errors share a direction: their plain sum
underestimates what a set of drops costs by 2 to 30 times.  c_code stands for what first order and
independence miss.  coherence.py fits both.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]


@dataclass(frozen=True)
class TierErrors:
    """Squared encode errors of every token in every tier, in the frame.

    key, value: (n_formats, n_layers, n_kv_heads, n_context) float32, one slice per distinct format.
    key_format, value_format: (n_tiers) slice of each tier.
    """

    key: NDArray[np.float32]
    value: NDArray[np.float32]
    key_format: tuple[int, ...]
    value_format: tuple[int, ...]

    @property
    def n_tiers(self) -> int:
        return len(self.key_format)

    def token_costs(self, tier: int, layer: int, utilities: "Utilities") -> Float:
        """Cost of one tier per token of a layer: (n_kv_heads, n_context)."""
        key = self.key[self.key_format[tier], layer] * utilities.key[layer]
        value = self.value[self.value_format[tier], layer] * utilities.value[layer]
        cost: Float = key + value
        return cost


@dataclass(frozen=True)
class Utilities:
    """Expected damage per token: (n_layers, n_kv_heads, n_context) each."""

    key: Float
    value: Float
    drop: Float


@dataclass(frozen=True)
class Coefficients:
    """c_drop and c_code, (n_layers, n_kv_heads) each."""

    drop: Float
    code: Float

    @staticmethod
    def constant(shape: tuple[int, int], drop: float, code: float = 1.0) -> "Coefficients":
        """The same in all (n_layers, n_kv_heads) = shape."""
        return Coefficients(np.full(shape, drop), np.full(shape, code))


@dataclass(frozen=True)
class DocumentCosts:
    """Costs of every option, summed over pages and over heads.

    pages: (n_layers, n_kv_heads, n_pages, n_options); tokens: (n_options, n_context), summed over
    layers and heads, for plans that treat all heads alike.
    """

    pages: Float
    tokens: Float


def document_costs(
    errors: TierErrors,
    utilities: Utilities,
    coefficients: Coefficients,
    order: NDArray[np.int64],
    page_size: int,
) -> DocumentCosts:
    """Costs of one document, layer by layer so that memory stays that of one layer's tokens.

    Args:
        order: (n_layers, n_kv_heads, n_context) token at each rank, as `order_by_score` gives it.
    """
    n_layers, n_kv_heads, n_context = order.shape
    n_options = 1 + errors.n_tiers
    n_pages = -(-n_context // page_size)
    pages = np.empty((n_layers, n_kv_heads, n_pages, n_options))
    tokens = np.zeros((n_options, n_context))
    for layer in range(n_layers):
        costs = token_option_costs(errors, utilities, coefficients, layer)
        tokens += costs.sum(axis=1)
        pages[layer] = page_option_costs(costs, order[layer], page_size)
    return DocumentCosts(pages, tokens)


def token_option_costs(
    errors: TierErrors, utilities: Utilities, coefficients: Coefficients, layer: int
) -> Float:
    """(n_options, n_kv_heads, n_context) cost of every option in a layer; option 0 drops."""
    costs = np.empty((1 + errors.n_tiers, *utilities.drop.shape[1:]))
    costs[0] = coefficients.drop[layer][:, None] * utilities.drop[layer]
    for tier in range(errors.n_tiers):
        plain = errors.token_costs(tier, layer, utilities)
        costs[1 + tier] = coefficients.code[layer][:, None] * plain
    return costs


def order_by_score(scores: Float) -> NDArray[np.int64]:
    """(n_layers, n_kv_heads, n_context) token at each rank: falling score, ties by position."""
    return np.argsort(-scores, axis=-1, kind="stable")


def page_option_costs(token_costs: Float, order: NDArray[np.int64], page_size: int) -> Float:
    """(n_kv_heads, n_pages, n_options) summed cost of each page of a layer.

    Args:
        token_costs: (n_options, n_kv_heads, n_context).
        order: (n_kv_heads, n_context) token at each rank.
    """
    n_options, n_kv_heads, n_context = token_costs.shape
    starts = np.arange(0, n_context, page_size)
    pages = np.empty((n_kv_heads, starts.size, n_options))
    for option in range(n_options):
        ranked = np.take_along_axis(token_costs[option], order, axis=-1)
        pages[..., option] = np.add.reduceat(ranked, starts, axis=-1)
    return pages


def page_of_token(order: NDArray[np.int64], page_size: int) -> NDArray[np.int32]:
    """(n_layers, n_kv_heads, n_context) page of each token, by position."""
    pages = np.empty(order.shape, dtype=np.int32)
    ranks = np.broadcast_to(np.arange(order.shape[-1], dtype=np.int32) // page_size, order.shape)
    np.put_along_axis(pages, order, ranks, axis=-1)
    return pages


def option_of_token(option_of_page: NDArray[np.int8], pages: NDArray[np.int32]) -> NDArray[np.int8]:
    """(n_layers, n_kv_heads, n_context) option of each token from that of its page."""
    return np.take_along_axis(option_of_page, pages.astype(np.int64), axis=-1)


def plan_cost(page_costs: Float, option_of_page: NDArray[np.int8]) -> float:
    """Summed cost of a plan; page_costs as in `DocumentCosts`."""
    chosen = np.take_along_axis(page_costs, option_of_page[..., None].astype(np.int64), axis=-1)
    return float(chosen.sum())
