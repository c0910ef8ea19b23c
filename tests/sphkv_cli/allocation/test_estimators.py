"""Scores see what they may see and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sphkv_cli.allocation.attention_utility import LayerGeometry
from sphkv_cli.allocation.context import LayerContext, Split
from sphkv_cli.allocation.estimators import ESTIMATORS, estimator_of
from sphkv_cli.errors import UsageError

N_TOKENS, N_CONTEXT = 40, 30


def context(*, positions=None, window: int = 0, seed: int = 0) -> LayerContext:
    """Random vectors; queries at every position unless given."""
    rng = torch.Generator().manual_seed(seed)
    positions = torch.arange(N_TOKENS) if positions is None else torch.tensor(positions)
    first, last = np.searchsorted(positions.numpy(), [N_CONTEXT - 8, N_CONTEXT])
    queries = 2 * torch.randn(len(positions), 4, 8, generator=rng)
    keys = torch.randn(N_TOKENS, 2, 8, generator=rng)
    values = torch.randn(N_TOKENS, 2, 8, generator=rng)
    return LayerContext(
        layer=0,
        split=Split(N_CONTEXT, slice(int(first), int(last)), slice(int(last), len(positions))),
        geometry=LayerGeometry(0.35, window=window),
        head_weights=torch.ones(4),
        positions=positions,
        queries=queries,
        keys=keys,
        values=values,
        queries_framed=queries,
        keys_framed=keys,
        values_framed=values,
    )


@pytest.mark.parametrize("name", ["window", "recency"])
@pytest.mark.parametrize("window", [0, 12])
def test_scores_read_nothing_after_the_context(name: str, window: int) -> None:
    clean = context(window=window)
    poisoned = replace(
        clean,
        keys=clean.keys.clone(),
        values=clean.values.clone(),
        queries=clean.queries.clone(),
        queries_framed=clean.queries.clone(),
    )
    for vectors in (poisoned.keys, poisoned.values, poisoned.queries, poisoned.queries_framed):
        vectors[N_CONTEXT:] = torch.nan
    # Nor what came before the window.
    poisoned.queries[: N_CONTEXT - 8] = torch.nan
    score = estimator_of(name).score
    torch.testing.assert_close(score(poisoned), score(clean), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_scores_are_finite_and_not_negative(kind) -> None:
    for window in (0, 12, 64):
        score = kind().score(context(window=window))
        assert score.shape == (2, N_CONTEXT)
        assert bool(torch.isfinite(score).all())
        assert bool((score >= 0).all())


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_tokens_beyond_the_reach_of_the_future_score_zero(kind) -> None:
    score = kind().score(context(window=12))
    # The first query after the context, at 30, sees tokens 19 and later.
    assert bool((score[:, :19] == 0).all())
    assert bool((score[:, 19:] > 0).all())


def test_reach_is_the_fraction_of_later_positions_that_see_a_token() -> None:
    reach = context(window=12).reach()
    for token in range(N_CONTEXT):
        seeing = sum(position - token < 12 for position in range(N_CONTEXT, N_TOKENS))
        assert float(reach[token]) == pytest.approx(seeing / (N_TOKENS - N_CONTEXT))
    assert bool((context().reach() == 1).all())


def test_oracle_is_the_only_one_that_sees_the_future() -> None:
    one = context()
    other = replace(one, queries=one.queries.clone())
    other.queries[N_CONTEXT:] *= -1
    assert estimator_of("oracle").is_ceiling
    assert not torch.equal(estimator_of("oracle").score(one), estimator_of("oracle").score(other))
    for name in ("window", "recency"):
        assert not estimator_of(name).is_ceiling


def test_recency_orders_by_position() -> None:
    score = estimator_of("recency").score(context())
    assert bool((score[:, 1:] > score[:, :-1]).all())


def test_last_tokens_that_no_captured_query_saw_score_like_the_window() -> None:
    # Queries every fourth position: the last one of the context sits at 27.
    sparse = context(positions=list(range(3, N_TOKENS, 4)))
    score = estimator_of("window").score(sparse)
    seen = score[:, 23:28]
    torch.testing.assert_close(score[:, 28:], seen.mean(1, keepdim=True).expand(2, 2))
    assert bool((score[:, 28:] > 0).all())


def test_unknown_estimators_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'snapkv' is not known; choose one of window, recency"):
        estimator_of("snapkv")
