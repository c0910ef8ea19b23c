"""Laws of the growing allocation, against HiGHS under the same history."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings
from scipy.optimize import Bounds, LinearConstraint, milp

from sphkv_cli.allocation.solver import InfeasibleBudgetError, solve
from sphkv_cli.growing.allocation import GrowingAllocation
from sphkv_cli.growing.bound import solve_under
from sphkv_cli.growing.cover import cheapest_cover
from sphkv_cli.growing.schedule import BudgetSchedule

PAGE_BYTES = np.array([0, 1291, 1803, 2315, 4299, 8203])
N_OPTIONS = PAGE_BYTES.size


def page_costs(rng: np.random.Generator, n_pages: int) -> np.ndarray:
    """Falling along the options on the whole, not always convex, over orders of magnitude."""
    relative = np.array([1.0, 0.1, 0.03, 0.01, 3e-4, 0.0])
    needs = np.exp(rng.normal(0, 2.5, (n_pages, 1)))
    return needs * relative * np.exp(rng.normal(0, 0.4, (n_pages, N_OPTIONS)))


def best_under_history(
    costs: np.ndarray, sizes: np.ndarray, ceilings: np.ndarray, budget: int
) -> float:
    """HiGHS, options above a page's ceiling forbidden."""
    n_pages, n_options = costs.shape
    allowed = (np.arange(n_options) <= ceilings[:, None]).astype(float)
    unit = max(float(costs.min(axis=1).sum()), 1e-3 * float(costs[:, 0].mean())) / 1e3
    result = milp(
        costs.ravel() / unit,
        constraints=[
            LinearConstraint(np.kron(np.eye(n_pages), np.ones(n_options)), 1, 1),
            LinearConstraint(sizes.ravel()[None], -np.inf, budget),
        ],
        integrality=np.ones(costs.size),
        bounds=Bounds(0, allowed.ravel()),
        options={"mip_rel_gap": 0.0},
    )
    assert result.success, result.message
    return float(result.fun) * unit


schedules = st.sampled_from(["per token", "absolute", "shrinking"])


def budgets_of(kind: str, n_steps: int, per_step: int) -> list[int]:
    schedule = {
        "per token": BudgetSchedule(per_step),
        "absolute": BudgetSchedule(1e9, at_most_bytes=3 * per_step),
        "shrinking": BudgetSchedule(per_step, factors=((n_steps // 2, 0.5), (n_steps - 1, 0.6))),
    }[kind]
    return [schedule.budget_bytes(step + 1) for step in range(n_steps)]


# A page that moves early in a step and meets the exact choice at its end.
@example("shrinking", 0, 5, 3405)
@given(schedules, st.integers(0, 10_000), st.integers(1, 5), st.integers(900, 6000))
@settings(max_examples=60, deadline=None)
def test_budget_holds_after_every_step_and_precision_never_rises(
    kind: str, seed: int, n_new: int, per_page: int
) -> None:
    rng = np.random.default_rng(seed)
    cache = GrowingAllocation(N_OPTIONS)
    for budget in budgets_of(kind, 8, n_new * per_page):
        before = cache.options
        step = cache.append(page_costs(rng, n_new), PAGE_BYTES, budget)
        options = cache.options
        assert step.used_bytes == cache.used_bytes == PAGE_BYTES[options].sum() <= budget
        assert np.all(options[: before.size] <= before)
        each = np.arange(options.size)
        assert cache.costs[each, options].sum() == pytest.approx(step.cost)
        # The demotions say all that changed.
        told = before.copy()
        for demotion in step.demotions:
            assert told[demotion.page] == demotion.before > demotion.after
            told[demotion.page] = demotion.after
        np.testing.assert_array_equal(told, options[: before.size])
        np.testing.assert_array_equal(step.options, options[before.size :])


@pytest.mark.parametrize("kind", ["per token", "absolute", "shrinking"])
@pytest.mark.parametrize("n_new", [1, 3, 6])
def test_every_step_is_within_two_percent_of_the_best_under_its_history(
    kind: str, n_new: int
) -> None:
    worst = 1.0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        cache = GrowingAllocation(N_OPTIONS)
        for budget in budgets_of(kind, 8, n_new * 1900):
            ceilings = np.append(cache.options, np.full(n_new, N_OPTIONS - 1))
            step = cache.append(page_costs(rng, n_new), PAGE_BYTES, budget)
            best = best_under_history(cache.costs, cache.option_bytes, ceilings, budget)
            worst = max(worst, step.cost / best)
            assert step.cost >= best * (1 - 1e-6)
            bound = solve_under(cache.costs, cache.option_bytes, ceilings, budget).dual_bound
            assert bound <= best * (1 + 1e-6)
    assert worst <= 1.02


def test_many_pages_stay_within_two_percent_of_the_dual_bound_under_their_history() -> None:
    rng = np.random.default_rng(4)
    cache = GrowingAllocation(N_OPTIONS)
    schedule = BudgetSchedule(90 * 1500, factors=((12, 0.6),))
    for step in range(20):
        budget = schedule.budget_bytes(step + 1)
        ceilings = np.append(cache.options, np.full(90, N_OPTIONS - 1))
        cost = cache.append(page_costs(rng, 90), PAGE_BYTES, budget).cost
        bound = solve_under(cache.costs, cache.option_bytes, ceilings, budget).dual_bound
        assert bound <= cost <= 1.02 * bound
    free = solve(cache.costs, PAGE_BYTES, budget)
    assert free.dual_bound <= cost


def test_without_a_past_the_result_is_that_of_one_solution() -> None:
    costs = page_costs(np.random.default_rng(5), 500)
    budget = 1500 * 500
    step = GrowingAllocation(N_OPTIONS).append(costs, PAGE_BYTES, budget)
    solution = solve(costs, PAGE_BYTES, budget)
    assert step.cost == pytest.approx(solution.plan.cost, rel=1e-3)


def test_covers_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(8)
    for _ in range(60):
        n_pages = int(rng.integers(1, 6))
        freed = np.cumsum(rng.integers(1, 9, (n_pages, 4)), axis=1)[:, ::-1] - 1
        freed -= freed[:, -1:]
        lost = rng.integers(0, 5, (n_pages, 4)).astype(float) + freed
        lost[:, -1] = 0.0
        forbidden = rng.random((n_pages, 4)) < 0.2
        freed[:, 1:3][forbidden[:, 1:3]] = -1
        wanted = int(rng.integers(1, freed[:, 0].sum() + 1))
        found = cheapest_cover(freed, lost, wanted)
        each = np.arange(n_pages)
        assert freed[each, found].min() >= 0
        assert freed[each, found].sum() >= wanted
        best = min(
            lost[each, list(plan)].sum()
            for plan in itertools.product(range(4), repeat=n_pages)
            if freed[each, list(plan)].min() >= 0 and freed[each, list(plan)].sum() >= wanted
        )
        assert lost[each, found].sum() == best


def test_a_page_that_is_coded_already_stays_at_or_below_its_option() -> None:
    rng = np.random.default_rng(6)
    cache = GrowingAllocation(N_OPTIONS)
    at_most = rng.integers(0, N_OPTIONS, 40)
    cache.append(page_costs(rng, 40), PAGE_BYTES, 10**9, at_most=at_most)
    assert np.all(cache.options <= at_most)
    cache.shrink(40 * 600)
    assert np.all(cache.options <= at_most)
    assert cache.used_bytes <= 40 * 600


def test_a_larger_budget_brings_nothing_back() -> None:
    cache = GrowingAllocation(N_OPTIONS)
    cache.append(page_costs(np.random.default_rng(7), 20), PAGE_BYTES, 20 * 1000)
    before = cache.options
    step = cache.shrink(10**9)
    np.testing.assert_array_equal(cache.options, before)
    assert step.demotions == ()


def test_an_infeasible_step_changes_nothing() -> None:
    cache = GrowingAllocation(2)
    costs = np.array([[1.0, 0.0]])
    cache.append(costs, np.array([10, 20]), 20)
    with pytest.raises(InfeasibleBudgetError, match="19 bytes is below the 20 bytes"):
        cache.append(costs, np.array([10, 20]), 19)
    assert cache.n_pages == 1
    assert cache.used_bytes == 20
    assert cache.append(costs, np.array([10, 20]), 20).used_bytes == 20


@pytest.mark.parametrize(
    ("costs", "sizes", "words"),
    [
        (np.array([[1.0, np.nan]]), np.array([0, 1]), "finite"),
        (np.array([[1.0]]), np.array([0, 1]), "shape"),
        (np.array([[1.0, 0.0]]), np.array([1, 0]), "fall"),
        (np.array([[1.0, 0.0]]), np.array([0.0, 1.0]), "integers"),
    ],
)
def test_wrong_pages_are_refused(costs: np.ndarray, sizes: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GrowingAllocation(2).append(costs, sizes, 10)


def test_schedules_take_the_least_of_their_limits() -> None:
    schedule = BudgetSchedule(10.0, at_most_bytes=500, factors=((100, 0.5),))
    assert [schedule.budget_bytes(n) for n in (1, 40, 60, 99, 100)] == [10, 400, 500, 500, 250]
    with pytest.raises(ValueError, match="factors"):
        BudgetSchedule(1.0, factors=((3, 1.5),))
