"""Laws of the allocation solver, against HiGHS, brute force and hypothesis."""

import itertools
import time
import tracemalloc
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from sphkv_cli.allocation.hull import hull_rates, running_minimum
from sphkv_cli.allocation.solver import InfeasibleBudgetError, Solution, solve, solve_parts

# Sums of a few dozen doubles, taken in different orders.
ROUNDING = 1e-12

magnitudes = st.floats(0, 1e6, allow_subnormal=False) | st.sampled_from([0.0, 1.0, 2.0, 1e-30])
page_bytes = st.integers(0, 40)


@st.composite
def instances(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Costs (n_items, n_options) and bytes, shared or per item, with many ties."""
    n_items, n_options = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    costs = draw(arrays(np.float64, (n_items, n_options), elements=magnitudes))
    shape = (n_options,) if draw(st.booleans()) else (n_items, n_options)
    steps = draw(arrays(np.int64, shape, elements=page_bytes))
    return costs, np.cumsum(steps, axis=-1)


def bytes_of(sizes: np.ndarray, costs: np.ndarray) -> np.ndarray:
    return np.broadcast_to(sizes, costs.shape)


def budget_between(costs: np.ndarray, sizes: np.ndarray, share: float) -> int:
    each = bytes_of(sizes, costs)
    low, high = each[:, 0].sum(), each[:, -1].sum()
    return int(low + share * (high - low))


def random_instance(rng: np.random.Generator, n_items: int, n_options: int):
    """Costs that fall with the bytes, over eight orders of magnitude, not always convex."""
    sizes = np.cumsum(rng.integers(1, 9, (n_items, n_options)), axis=1)
    weights = np.exp(rng.normal(0, 2, (n_items, 1)))
    costs = weights * np.exp(-rng.uniform(0.1, 0.6) * sizes + rng.normal(0, 0.3, sizes.shape))
    return costs, sizes.astype(np.int64)


def highs(costs: np.ndarray, sizes: np.ndarray, budget: int) -> float:
    n_items, n_options = costs.shape
    one_each = np.kron(np.eye(n_items), np.ones(n_options))
    result = milp(
        costs.ravel(),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(bytes_of(sizes, costs).ravel()[None], -np.inf, budget),
        ],
        integrality=np.ones(costs.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    assert result.success, result.message
    return float(result.fun)


@given(instances(), st.floats(0, 1.2))
@settings(max_examples=300, deadline=None)
def test_budget_is_never_exceeded(instance, share: float) -> None:
    costs, sizes = instance
    budget = budget_between(costs, sizes, share)
    solution = solve(costs, sizes, budget)
    picked = solution.plan.option_of_item.astype(int)
    each = np.arange(len(picked))
    assert bytes_of(sizes, costs)[each, picked].sum() == solution.plan.used_bytes <= budget
    assert costs[each, picked].sum() == pytest.approx(solution.plan.cost, rel=ROUNDING)


@given(instances(), st.floats(0, 1.2))
@settings(max_examples=300, deadline=None)
def test_dual_never_exceeds_primal(instance, share: float) -> None:
    costs, sizes = instance
    solution = solve(costs, sizes, budget_between(costs, sizes, share))
    # The dual subtracts multiplier * budget from a sum that holds the same bytes again.
    slack = ROUNDING * (costs.sum() + solution.multiplier * solution.budget_bytes)
    assert solution.dual_bound <= solution.plan.cost + slack
    assert 0 <= solution.gap <= 1 + ROUNDING or solution.dual_bound < 0


@given(instances(), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_more_budget_never_hurts_the_dual(instance, one: float, other: float) -> None:
    costs, sizes = instance
    less, more = sorted(budget_between(costs, sizes, share) for share in (one, other))
    poor, rich = solve(costs, sizes, less), solve(costs, sizes, more)
    slack = ROUNDING * (costs.sum() + poor.multiplier * less + rich.multiplier * more)
    assert rich.dual_bound <= poor.dual_bound + slack
    assert rich.multiplier <= poor.multiplier * (1 + ROUNDING)


@given(instances(), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_better_of_greedy_and_uniform(instance, share: float) -> None:
    costs, sizes = instance
    budget = budget_between(costs, sizes, share)
    solution = solve(costs, sizes, budget)
    uniform = [
        costs[:, j].sum()
        for j in range(costs.shape[1])
        if bytes_of(sizes, costs)[:, j].sum() <= budget
    ]
    assert solution.uniform_cost == pytest.approx(min(uniform, default=np.inf), rel=ROUNDING)
    assert solution.plan.cost == pytest.approx(
        min(solution.greedy_cost, solution.uniform_cost), rel=ROUNDING
    )


def test_uniform_is_returned_where_it_wins() -> None:
    # The steepest step (item 0 to option 2, six bytes) leaves four bytes, too few for item 1.
    solution = solve(np.array([[12.0, 6.0, 0.0], [10.0, 1.0, 1.0]]), np.array([0, 5, 6]), 10)
    assert solution.greedy_cost == 10.0
    assert solution.plan.cost == 7.0
    assert solution.is_uniform
    assert solution.plan.option_of_item.tolist() == [1, 1]


def test_the_optimum_of_highs_lies_between_dual_and_plan() -> None:
    rng = np.random.default_rng(42)
    for trial in range(25):
        costs, sizes = random_instance(rng, int(rng.integers(2, 40)), int(rng.integers(2, 7)))
        budget = budget_between(costs, sizes, float(rng.uniform(0.02, 0.98)))
        solution = solve(costs, sizes, budget)
        # HiGHS stops within an absolute 1e-6: give it costs of a thousand.
        unit = solution.plan.cost / 1e3
        best = highs(costs / unit, sizes, budget) * unit
        assert solution.dual_bound <= best * (1 + 1e-6), trial
        assert best <= solution.plan.cost * (1 + 1e-6), trial
        assert solution.plan.cost - best <= solution.gap * solution.plan.cost + 1e-6 * best, trial


def test_the_dual_is_the_linear_relaxation() -> None:
    rng = np.random.default_rng(7)
    for _ in range(15):
        costs, sizes = random_instance(rng, 12, 5)
        budget = budget_between(costs, sizes, float(rng.uniform(0.05, 0.95)))
        relaxed = linprog(
            costs.ravel(),
            A_ub=sizes.ravel()[None],
            b_ub=[budget],
            A_eq=np.kron(np.eye(12), np.ones(5)),
            b_eq=np.ones(12),
        )
        # linprog stops at a relative 1e-7 or so.
        assert solve(costs, sizes, budget).dual_bound == pytest.approx(relaxed.fun, rel=1e-6)


def test_tiny_instances_are_near_brute_force() -> None:
    rng = np.random.default_rng(3)
    exact = 0
    for _ in range(60):
        costs, sizes = random_instance(rng, 4, 3)
        budget = budget_between(costs, sizes, float(rng.uniform(0, 1)))
        best = min(
            sum(costs[i, j] for i, j in enumerate(plan))
            for plan in itertools.product(range(3), repeat=4)
            if sum(sizes[i, j] for i, j in enumerate(plan)) <= budget
        )
        solution = solve(costs, sizes, budget)
        assert solution.dual_bound <= best * (1 + ROUNDING)
        assert best <= solution.plan.cost * (1 + ROUNDING)
        exact += solution.plan.cost <= best * (1 + ROUNDING)
    # A greedy completion misses some knapsacks of four items; most it must hit.
    assert exact >= 40


def test_gap_vanishes_with_many_items() -> None:
    costs, sizes = random_instance(np.random.default_rng(1), 4320, 6)
    solution = solve(costs, sizes, budget_between(costs, sizes, 0.3))
    assert solution.gap < 1e-4
    assert solution.budget_bytes - solution.plan.used_bytes < 9


@given(instances())
@settings(max_examples=150, deadline=None)
def test_hull_rates_are_the_slopes_of_the_lower_hull(instance) -> None:
    costs, sizes = instance
    best = running_minimum(np.ascontiguousarray(costs.T))
    each = np.ascontiguousarray(bytes_of(sizes, costs).T.astype(float))
    rates = hull_rates(best.copy(), each)
    assert np.all(rates[1:] <= rates[:-1])
    for i in range(best.shape[1]):
        corner = best[0, i]
        for k in range(rates.shape[0]):
            if np.isinf(rates[k, i]):
                corner = best[k + 1, i]
                continue
            corner -= rates[k, i] * (each[k + 1, i] - each[k, i])
            # The hull lies below every option, and reaches the last one's running minimum.
            assert corner <= best[k + 1, i] + 1e-9 * best[0, i]
        assert corner == pytest.approx(best[-1, i], abs=1e-9 * best[0, i])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("n_items", [1, 63, 40_000])
def test_identical_items_use_the_whole_budget(n_items: int, share: float) -> None:
    costs = np.tile([8.0, 4.0, 2.0, 1.0], (n_items, 1))
    sizes = np.array([0, 10, 20, 30])
    budget = budget_between(costs, sizes, share)
    solution = solve(costs, sizes, budget)
    assert budget - solution.plan.used_bytes < 10
    # Integer optimum: buy the steepest of the remaining steps one by one.
    steps = budget // 10
    first, second = min(steps, n_items), min(max(steps - n_items, 0), n_items)
    third = max(steps - 2 * n_items, 0)
    assert solution.plan.cost == 8.0 * n_items - 4 * first - 2 * second - third


def test_straight_hulls_are_not_cut_inside() -> None:
    # Item 0 is one straight piece of rate 1 whose middle option lies far above it; half of the
    # piece fits, but the bytes are better spent on item 1.
    costs = np.array([[10.0, 9.0, 0.0], [8.0, 4.5, 4.4]])
    solution = solve(costs, np.array([0, 5, 10]), 5)
    assert solution.plan.option_of_item.tolist() == [0, 1]
    assert solution.plan.cost == 14.5


def test_dominated_options_are_never_chosen() -> None:
    costs = np.array([[5.0, 7.0, 1.0, 3.0]] * 3)
    sizes = np.array([0, 1, 2, 9])
    for budget in range(30):
        picked = set(solve(costs, sizes, budget).plan.option_of_item.tolist())
        assert picked <= {0, 2}


def test_budget_below_the_minimum_is_refused_and_above_the_maximum_is_free() -> None:
    costs, sizes = random_instance(np.random.default_rng(5), 20, 4)
    low = int(sizes[:, 0].sum())
    with pytest.raises(InfeasibleBudgetError, match=f"{low - 1} bytes is below the {low} bytes"):
        solve(costs, sizes, low - 1)
    assert solve(costs, sizes, low).plan.cost == pytest.approx(costs[:, 0].sum())
    rich = solve(costs, sizes, 10 * int(sizes.sum()))
    assert rich.plan.cost == pytest.approx(costs.min(axis=1).sum())
    assert rich.gap <= ROUNDING
    assert rich.multiplier == 0


@pytest.mark.parametrize(
    ("costs", "sizes", "words"),
    [
        ([[1.0, np.nan]], [0, 1], "finite"),
        ([[1.0, np.inf]], [0, 1], "finite"),
        ([[1.0, -1.0]], [0, 1], "negative"),
        ([[1.0, 0.0]], [1, 0], "order"),
        ([[1.0, 0.0]], [-1, 0], "negative"),
        ([[1.0, 0.0]], [0, 1, 2], "shape"),
        ([1.0, 0.0], [0, 1], "shape"),
        ([[1.0, 0.0]], [0.0, 1.0], "integers"),
    ],
)
def test_wrong_tables_are_refused(costs: list, sizes: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        solve(np.array(costs), np.array(sizes), 1)


def test_memory_stays_below_three_cost_tables() -> None:
    costs = np.random.default_rng(0).random((300_000, 6))
    sizes = np.array([0, 10, 20, 30, 40, 50])
    tracemalloc.start()
    started = time.perf_counter()
    solution: Solution = solve(costs, sizes, 25 * len(costs))
    seconds = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert solution.gap < 1e-5
    assert peak < 2 * costs.nbytes, f"{peak / costs.nbytes:.2f} tables beside the table"
    # 0.13 s here; far from a benchmark, near enough to catch a quadratic step.
    assert seconds < 5


@pytest.mark.parametrize("share", [0.05, 0.4, 0.9])
def test_layers_and_threads_change_nothing(share: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    # More than one task of blocks, so that threads really divide the work.
    costs, _ = random_instance(rng, 300_000, 4)
    sizes = np.array([0, 3, 5, 9])
    budget = int(share * 9 * len(costs))
    whole = solve(costs, sizes, budget, n_threads=1)
    path = tmp_path / "costs"
    costs.tofile(path)
    on_disk = np.memmap(path, dtype=np.float64, mode="r", shape=costs.shape)
    parts = [(on_disk[:7], sizes), (on_disk[7:150_000], sizes), (on_disk[150_000:], sizes)]
    streamed = solve_parts(parts, budget, n_threads=3)
    again = solve(costs, sizes, budget, n_threads=3)
    assert again.plan.cost == whole.plan.cost
    np.testing.assert_array_equal(again.plan.option_of_item, whole.plan.option_of_item)
    assert streamed.multiplier == whole.multiplier
    assert streamed.dual_bound == pytest.approx(whole.dual_bound, rel=ROUNDING)
    # The blocks of the fill differ; what it has left to spend is less than one segment.
    assert streamed.plan.used_bytes <= budget
    assert streamed.plan.cost == pytest.approx(whole.plan.cost, rel=1e-5)


def test_parts_with_their_own_bytes_share_one_budget() -> None:
    rng = np.random.default_rng(12)
    tables = [random_instance(rng, 8, 4) for _ in range(3)]
    sizes = [np.sort(rng.integers(0, 30, 4)) for _ in tables]
    budget = int(0.4 * sum(8 * size[-1] for size in sizes)) + 8 * sum(int(s[0]) for s in sizes)
    parts = [(costs, size) for (costs, _), size in zip(tables, sizes, strict=True)]
    together = solve_parts(parts, budget)
    costs = np.concatenate([costs for costs, _ in tables])
    each = np.concatenate([np.tile(size, (8, 1)) for size in sizes])
    assert together.plan.used_bytes <= budget
    best = highs(1e3 * costs / together.plan.cost, each, budget) * together.plan.cost / 1e3
    assert together.dual_bound <= best * (1 + 1e-6)
    assert best <= together.plan.cost * (1 + 1e-6)


def test_a_bin_full_of_ties_is_cut_within_the_budget() -> None:
    # All rates of all items lie in one bin, in falling steps of a part in a million.
    n_items = 5_000
    rates = 1 + 1e-6 * np.arange(3 * n_items)[::-1].reshape(3, n_items).T
    costs = np.concatenate([rates[:, ::-1].cumsum(axis=1)[:, ::-1], np.zeros((n_items, 1))], axis=1)
    for budget in (0, 1, n_items, n_items + 1, 2 * n_items - 1, 3 * n_items - 1):
        solution = solve(costs, np.arange(4), budget)
        assert solution.plan.used_bytes == budget
        assert solution.plan.cost == pytest.approx(
            np.sort(rates.ravel())[: 3 * n_items - budget].sum()
        )


@pytest.mark.parametrize("budget", [10, 20, 40, 49])
def test_a_rate_on_the_edge_of_a_bin_stays_in_its_bin(budget: int) -> None:
    # 49 / 49 is the least rate of its bin, and 49 * (1 / 49) lies below it.
    costs = np.array([[49.0, 0.0], [1000.0, 0.0], [0.01, 0.0]])
    sizes = np.array([[0, 49], [0, 10], [0, 10]])
    found = solve(costs, sizes, budget)
    assert found.plan.used_bytes <= budget
    assert found.dual_bound <= found.plan.cost * (1 + 1e-12)
    best = min(
        sum(costs[i, j] for i, j in enumerate(chosen))
        for chosen in itertools.product(range(2), repeat=3)
        if sum(sizes[i, j] for i, j in enumerate(chosen)) <= budget
    )
    assert found.plan.cost == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(
    n_items=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0.0, 1.0),
)
def test_whole_costs_and_sizes_are_solved_whatever_edges_they_hit(
    n_items: int, seed: int, share: float
) -> None:
    rng = np.random.default_rng(seed)
    sizes = np.sort(rng.integers(0, 64, (n_items, 3)), axis=1)
    costs = rng.integers(0, 64, (n_items, 3)).astype(float)
    least, most = int(sizes[:, 0].sum()), int(sizes[:, -1].sum())
    budget = least + int(share * (most - least))
    found = solve(costs, sizes, budget)
    assert found.plan.used_bytes <= budget
    assert found.dual_bound <= found.plan.cost + 1e-9
