"""Pages, their costs and their bytes, against the page format and plain sums."""

import numpy as np
import pytest
import torch

from sphkv_cli.allocation.baselines import best_uniform
from sphkv_cli.allocation.layout import PageLayout, fixed_table_bytes, order_tiers
from sphkv_cli.allocation.page_costs import (
    Coefficients,
    TierErrors,
    Utilities,
    document_costs,
    option_of_token,
    order_by_score,
    page_of_token,
    plan_cost,
    token_option_costs,
)
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.cache_builder import build_cache
from sphkv_kernels.page_slots import SequenceTokens
from sphkv_kernels.tier import TierFormat

HEAD_DIM, PAGE_SIZE, N_LAYERS, N_KV_HEADS, N_CONTEXT = 16, 16, 2, 3, 65
EIGHT = Coefficients.constant((N_LAYERS, N_KV_HEADS), 8.0)
LOW = SphericalCode.analytic("low", HEAD_DIM, (3, 1, 1), "lloyd_max:1")
HIGH = SphericalCode.analytic("high", HEAD_DIM, (4, 2, 2, 2), "norm")
TIERS = (
    TierFormat.dense(),
    TierFormat.spherical(HIGH, LOW),
    TierFormat.int8(),
    TierFormat.spherical(LOW),
)


def layout(**options) -> PageLayout:
    options.setdefault("stores_positions", (False, True))
    options.setdefault("fixed_bytes", 100)
    return PageLayout(
        tiers=order_tiers(TIERS, HEAD_DIM, PAGE_SIZE),
        head_dim=HEAD_DIM,
        page_size=PAGE_SIZE,
        n_kv_heads=N_KV_HEADS,
        **options,
    )


def random_plan(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Options of pages and the page of each token."""
    scores = rng.random((N_LAYERS, N_KV_HEADS, N_CONTEXT))
    pages = page_of_token(order_by_score(scores), PAGE_SIZE)
    return rng.integers(0, 5, (N_LAYERS, N_KV_HEADS, 5)).astype(np.int8), pages


def test_tiers_are_ordered_by_page_bytes() -> None:
    assert layout().option_names == ("drop", "low", "high/low", "int8", "dense")
    with pytest.raises(ValueError, match="non-decreasing"):
        PageLayout(TIERS, HEAD_DIM, PAGE_SIZE, 1, (False,), 0)


@pytest.mark.parametrize("seed", range(4))
def test_laid_out_bytes_are_those_of_the_cache_itself(seed: int) -> None:
    rng = np.random.default_rng(seed)
    options, pages = random_plan(rng)
    laid_out = layout().measure(options, N_CONTEXT)
    tokens = option_of_token(options, pages)
    total = 0
    for layer in range(N_LAYERS):
        x = torch.from_numpy(rng.standard_normal((2, N_CONTEXT, N_KV_HEADS, HEAD_DIM)))
        sequence = SequenceTokens(
            x[0],
            x[1],
            torch.from_numpy(np.ascontiguousarray(tokens[layer].T)) - 1,
            torch.from_numpy(np.ascontiguousarray(pages[layer].T)),
            torch.arange(N_CONTEXT) if layer == 1 else None,
        )
        cache = build_cache(layout().tiers, PAGE_SIZE, [sequence], position_dtype=torch.uint16)
        total += cache.pool.numel() + cache.page_table.n_bytes
        if cache.positions is not None:
            total += cache.positions.numel() * cache.positions.element_size()
    assert laid_out.total == total + 100
    assert min(laid_out.codes, laid_out.padding, laid_out.page_table, laid_out.positions) >= 0


def test_option_bytes_sum_to_the_laid_out_total() -> None:
    options, _ = random_plan(np.random.default_rng(9))
    sizes = layout().option_bytes()
    pages = sum(
        int(sizes[layer, option]) for layer in range(N_LAYERS) for option in options[layer].ravel()
    )
    assert pages + layout().overhead_bytes() == layout().measure(options, N_CONTEXT).total
    full = np.full((N_LAYERS, N_KV_HEADS, 5), 4, dtype=np.int8)
    assert layout().dense_bytes(N_CONTEXT) == layout().measure(full, N_CONTEXT).total
    assert layout().measure(0 * full, N_CONTEXT).total == layout().overhead_bytes()


def test_padding_is_what_live_tokens_do_not_fill() -> None:
    full = np.full((N_LAYERS, N_KV_HEADS, 4), 4, dtype=np.int8)
    assert layout().measure(full, 64).padding == 0
    # One page of 16 dense rows, 15 of them dead, per head: 2 x 2 bytes per coordinate.
    more = np.full((N_LAYERS, N_KV_HEADS, 5), 4, dtype=np.int8)
    assert layout().measure(more, 65).padding == 6 * 15 * 4 * HEAD_DIM


def test_fixed_tables_are_counted() -> None:
    mean = np.zeros((N_LAYERS, N_KV_HEADS, HEAD_DIM), dtype=np.float32)
    frames = FrameSet(Rotation("haar", HEAD_DIM), "post_rope", mean)
    books = sum(LOW.n_cells) + sum(HIGH.n_cells)
    assert fixed_table_bytes(frames, TIERS) == 4 * HEAD_DIM**2 + mean.nbytes + 4 * books
    bare = FrameSet(Rotation("hadamard", HEAD_DIM))
    assert fixed_table_bytes(bare, (TierFormat.dense(),)) == HEAD_DIM // 8


def costs_of(rng: np.random.Generator) -> tuple[TierErrors, Utilities, np.ndarray]:
    shape = (N_LAYERS, N_KV_HEADS, N_CONTEXT)
    errors = TierErrors(
        rng.random((2, *shape)).astype(np.float32),
        rng.random((1, *shape)).astype(np.float32),
        key_format=(0, 1),
        value_format=(0, 0),
    )
    utilities = Utilities(rng.random(shape), rng.random(shape), rng.random(shape))
    by_layer = [token_option_costs(errors, utilities, EIGHT, layer) for layer in range(N_LAYERS)]
    return errors, utilities, np.stack(by_layer, axis=1)


def test_token_costs_follow_the_formula() -> None:
    errors, utilities, costs = costs_of(np.random.default_rng(0))
    at = (1, 2, 7)
    assert costs[0][at] == 8.0 * utilities.drop[at]
    for tier in (0, 1):
        expected = (
            utilities.key[at] * errors.key[tier][at] + utilities.value[at] * errors.value[0][at]
        )
        assert costs[1 + tier][at] == pytest.approx(expected)


def test_pages_hold_tokens_of_falling_score_and_sum_their_costs() -> None:
    rng = np.random.default_rng(1)
    errors, utilities, costs = costs_of(rng)
    scores = rng.integers(0, 9, costs.shape[1:]).astype(float)
    order = order_by_score(scores)
    pages = page_of_token(order, PAGE_SIZE)
    both = document_costs(errors, utilities, EIGHT, order, PAGE_SIZE)
    found = both.pages
    np.testing.assert_allclose(both.tokens, costs.sum(axis=(1, 2)))
    for layer, head in np.ndindex(N_LAYERS, N_KV_HEADS):
        mine = pages[layer, head]
        assert np.bincount(mine).tolist() == [16, 16, 16, 16, 1]
        for page in range(5):
            held = mine == page
            np.testing.assert_allclose(
                found[layer, head, page], costs[:, layer, head, held].sum(axis=-1)
            )
            if page:
                assert scores[layer, head, held].max() <= scores[layer, head, mine < page].min()
    # Equal scores: the earlier token comes first.
    tied = order_by_score(np.ones((1, 1, 5)))
    assert tied[0, 0].tolist() == [0, 1, 2, 3, 4]


def test_plan_cost_is_the_sum_over_its_tokens() -> None:
    rng = np.random.default_rng(2)
    errors, utilities, costs = costs_of(rng)
    order = order_by_score(rng.random(costs.shape[1:]))
    options = rng.integers(0, 3, (N_LAYERS, N_KV_HEADS, 5)).astype(np.int8)
    pages = document_costs(errors, utilities, EIGHT, order, PAGE_SIZE).pages
    tokens = option_of_token(options, page_of_token(order, PAGE_SIZE))
    by_token = np.take_along_axis(costs, tokens[None].astype(int), axis=0).sum()
    assert plan_cost(pages, options) == pytest.approx(by_token)


def test_baselines_are_the_cheapest_that_fit() -> None:
    rng = np.random.default_rng(3)
    costs = rng.uniform(0.9, 1.1, (5, N_CONTEXT)) * [[100.0], [4.0], [3.0], [2.0], [1.0]]
    costs[:, 0] *= 1000
    here = layout()

    def uniform_bytes(option: int) -> int:
        plan = np.full((N_LAYERS, N_KV_HEADS, 5), option, dtype=np.int8)
        return here.measure(plan, N_CONTEXT).total

    fits_two = best_uniform(costs, here, uniform_bytes(2), sink_page=False)
    assert fits_two is not None
    assert (fits_two.option, fits_two.laid_out.total) == (2, uniform_bytes(2))
    assert fits_two.cost == pytest.approx(costs[2].sum())
    budget = uniform_bytes(3)
    uniform = best_uniform(costs, here, budget, sink_page=False)
    sink = best_uniform(costs, here, budget, sink_page=True)
    assert uniform is not None
    assert sink is not None
    assert sink.laid_out.total <= budget
    # Token 0 costs a thousand times the others: its page is worth a smaller tier for the rest.
    assert sink.cost < uniform.cost
    assert sink.sink_option > sink.option
    assert "first page" in sink.describe(here)
    assert np.all(sink.option_of_token[:PAGE_SIZE] == sink.sink_option)
    assert np.all(sink.option_of_token[PAGE_SIZE:] == sink.option)
    assert best_uniform(costs, here, uniform_bytes(1) - 1, sink_page=True) is None
