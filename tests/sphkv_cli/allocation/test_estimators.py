"""Scores see what they may see and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sphkv_cli.allocation.attention_utility import LayerGeometry
from sphkv_cli.allocation.combination import COMBINED, Combination, LayerSamples, fit_weights
from sphkv_cli.allocation.context import LayerContext, Split
from sphkv_cli.allocation.estimator_names import ORACLE, SIGNAL_NAMES, UTILITIES, require_utility
from sphkv_cli.allocation.estimators import Oracle, SignalUtility, UtilityEstimator
from sphkv_cli.allocation.future_queries import FutureQueries
from sphkv_cli.allocation.signals import SIGNALS
from sphkv_cli.errors import UsageError

N_TOKENS, N_CONTEXT = 40, 30
ALLOWED = tuple(name for name in UTILITIES if name != ORACLE)


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


def future(*, turning: bool = True) -> FutureQueries:
    """Queries of one layer of 4 query heads."""
    rng = np.random.default_rng(5)
    sample = 2 * rng.standard_normal((1, 16, 4, 8)).astype(np.float32)
    factor = rng.standard_normal((1, 4, 8, 8)).astype(np.float32)
    return FutureQueries(
        sample,
        sample.mean(axis=1),
        factor @ np.swapaxes(factor, -1, -2) / 8,
        np.array([[1.0, 0.3, 0.1, 0.03]], dtype=np.float32) if turning else None,
    )


def estimator(name: str) -> UtilityEstimator:
    if name == ORACLE:
        return Oracle()
    if name in SIGNALS:
        return SignalUtility(SIGNALS[name], future())
    samples = [LayerSamples.of(context(seed=seed), future(), COMBINED) for seed in (11, 12, 13)]
    return Combination(fit_weights(samples)[None], future())


def test_every_signal_has_its_name() -> None:
    assert tuple(SIGNALS) == SIGNAL_NAMES


@pytest.mark.parametrize("name", ALLOWED)
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
    chosen = estimator(name)
    if not chosen.reads_all_queries:
        poisoned.queries[: N_CONTEXT - 8] = torch.nan
    torch.testing.assert_close(chosen.score(poisoned), chosen.score(clean), rtol=0, atol=0)


@pytest.mark.parametrize("name", UTILITIES)
def test_scores_are_finite_and_not_negative(name: str) -> None:
    for window in (0, 12, 64):
        score = estimator(name).score(context(window=window))
        assert score.shape == (2, N_CONTEXT)
        assert bool(torch.isfinite(score).all())
        assert bool((score >= 0).all())


@pytest.mark.parametrize("name", UTILITIES)
def test_tokens_beyond_the_reach_of_the_future_score_zero(name: str) -> None:
    score = estimator(name).score(context(window=12))
    # The first query after the context, at 30, sees tokens 19 and later.
    assert bool((score[:, :19] == 0).all())
    # Expected attention and calibration queries are asked from a few positions of the horizon only.
    assert bool((score[:, 22:] > 0).all())


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
    assert not torch.equal(Oracle().score(one), Oracle().score(other))
    assert [name for name in UTILITIES if estimator(name).is_ceiling] == [ORACLE]


def test_recency_orders_by_position() -> None:
    score = estimator("recency").score(context())
    assert bool((score[:, 1:] > score[:, :-1]).all())


@pytest.mark.parametrize("name", ["window", "half-window", "window-attention"])
def test_last_tokens_that_no_captured_query_saw_score_like_the_window(name: str) -> None:
    # Queries every fourth position: the last ones of the context sit at 23 and 27.
    sparse = context(positions=list(range(3, N_TOKENS, 4)))
    score = estimator(name).score(sparse)
    seen = score[:, (27 if name == "half-window" else 23) : 28]
    torch.testing.assert_close(score[:, 28:], seen.mean(1, keepdim=True).expand(2, 2))
    assert bool((score[:, 28:] > 0).all())


def test_accumulated_attention_is_the_sum_over_all_queries() -> None:
    whole = context()
    q = whole.queries[:N_CONTEXT].double().reshape(N_CONTEXT, 2, 2, 8)
    logits = 0.35 * torch.einsum("ihgd,jhd->hgij", q, whole.keys[:N_CONTEXT].double())
    logits = logits.masked_fill(torch.ones(N_CONTEXT, N_CONTEXT).triu(1).bool(), -torch.inf)
    expected = logits.softmax(-1).sum((1, 2))
    torch.testing.assert_close(estimator("accumulated").score(whole), expected)
    seeing = torch.arange(N_CONTEXT, 0, -1, dtype=torch.float64)
    torch.testing.assert_close(estimator("normalised").score(whole), expected / seeing)


def test_pooling_spreads_one_tokens_attention_over_seven() -> None:
    seen = estimator("window-attention").score(context())
    pooled = estimator("window-pooled").score(context())
    torch.testing.assert_close(pooled[:, 12], seen[:, 9:16].mean(1))
    torch.testing.assert_close(pooled[:, 0], seen[:, :4].mean(1))


def test_calibration_queries_are_asked_from_the_horizon() -> None:
    """Logits depend on distances alone: a context moved by 1000 tokens looks the same."""
    known, positions = future(), torch.arange(16)
    near, far = known.asked_from(0, positions), known.asked_from(0, positions + 1000)
    keys = torch.randn(16, 4, 8)
    moved = known.turned(0, keys, torch.full((16,), 1000))
    torch.testing.assert_close((near * keys).sum(-1), (far * moved).sum(-1), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(near[1:], far[1:], atol=0.1)
    still = future(turning=False)
    torch.testing.assert_close(still.asked_from(0, positions), torch.from_numpy(still.sample[0]))


def test_expected_attention_is_the_mean_over_gaussian_queries() -> None:
    """E exp(scale q.k) of N(mean, covariance) in closed form, against sampled queries."""
    inputs, known = context(), future(turning=False)
    known = replace(known, mean=known.mean / 2, covariance=known.covariance / 8)
    found = SignalUtility(SIGNALS["expected-attention"], known).score(inputs)
    rng = np.random.default_rng(0)
    total = torch.zeros(2, N_CONTEXT, dtype=torch.float64)
    for head in range(4):
        q = rng.multivariate_normal(known.mean[0, head], known.covariance[0, head], 200_000)
        k = inputs.keys[:N_CONTEXT, head // 2].double()
        weights = torch.exp(0.35 * torch.from_numpy(q) @ k.T).mean(0)
        norms = inputs.values[:N_CONTEXT, head // 2].double().norm(dim=-1)
        total[head // 2] += (weights / weights.sum() * norms).square()
    # Asked from eight positions, which are all the same without RoPE.
    torch.testing.assert_close(found / 8, total, rtol=0.03, atol=0)


def test_the_combination_orders_unseen_contexts_better_than_any_signal() -> None:
    """On random vectors the mean over documents, not on each."""
    chosen = {name: estimator(name) for name in ("combination", *SIGNAL_NAMES)}
    gained = dict.fromkeys(chosen, 0.0)
    for seed in range(30, 40):
        unseen = context(seed=seed)
        truth = unseen.horizon_utility.drop.argsort(-1).argsort(-1).double()
        for name, one in chosen.items():
            ranks = one.score(unseen).argsort(-1).argsort(-1).double()
            gained[name] += float(torch.corrcoef(torch.cat([ranks, truth])[[0, 2]])[0, 1])
    assert gained["combination"] > max(gained[name] for name in SIGNAL_NAMES)


def test_a_constant_signal_gets_no_weight() -> None:
    rng = torch.Generator().manual_seed(0)
    logs = torch.randn(1, 50, 3, dtype=torch.float64, generator=rng)
    logs[..., 1] = 2.0
    weights = fit_weights([LayerSamples(logs, 3 * logs[..., 0] - logs[..., 2])])
    np.testing.assert_allclose(weights[0, 1:], [3, 0, -1], atol=0.05)
    assert weights[0, 2] == 0


def test_unknown_estimators_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'snapkv' is not known; choose one of combination, win"):
        require_utility("snapkv")


def test_expected_attention_turns_its_queries_to_the_horizon() -> None:
    """Without spread it is the attention of the mean query, turned forward to each position."""
    inputs, known = context(), future()
    known = replace(known, covariance=0 * known.covariance)
    horizon = N_CONTEXT + ((torch.arange(8) + 0.5) / 8 * (N_TOKENS - N_CONTEXT)).long()
    total = torch.zeros(2, N_CONTEXT, dtype=torch.float64)
    mean = torch.from_numpy(known.mean[0])
    for position in horizon:
        asked = known.turned(0, mean[None], position[None])[0].double()
        for head in range(4):
            p = torch.softmax(0.35 * inputs.keys[:N_CONTEXT, head // 2].double() @ asked[head], 0)
            norms = inputs.values[:N_CONTEXT, head // 2].double().norm(dim=-1)
            total[head // 2] += (p * norms).square()
    found = SignalUtility(SIGNALS["expected-attention"], known).score(inputs)
    torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-12)


def test_the_fit_cares_for_the_tokens_that_matter() -> None:
    """A few tokens of large damage follow one signal, many of small damage the other."""
    rng = torch.Generator().manual_seed(0)
    logs = torch.randn(1, 1000, 2, dtype=torch.float64, generator=rng)
    target = torch.where(torch.arange(1000) < 100, 4 + logs[0, :, 0], -4 + logs[0, :, 1])
    weights = fit_weights([LayerSamples(logs, target[None])])[0]
    plain = np.linalg.lstsq(logs[0].numpy(), target.numpy() - target.numpy().mean(), rcond=None)[0]
    assert plain[0] < plain[1]
    assert weights[1] > weights[2]
