"""Calibrated damage: monotone in the score, right on the mean, never zero for the unseen."""

import numpy as np
import pytest

from sphkv_cli.allocation.calibration import QUANTITIES, CalibrationTables, fit_tables


def tables(scores: np.ndarray, damage: np.ndarray) -> CalibrationTables:
    """One layer, one head, the same damage for every quantity."""
    future = {name: damage.reshape(1, 1, -1) for name in QUANTITIES}
    return fit_tables([scores.reshape(1, 1, -1)], [future])


def expected(fitted: CalibrationTables, scores: np.ndarray) -> np.ndarray:
    return fitted.expected(scores.reshape(1, 1, -1), "drop")[0, 0]


def test_expected_damage_never_falls_with_the_score() -> None:
    rng = np.random.default_rng(1)
    scores = np.exp(rng.normal(0, 3, 2000))
    damage = scores**0.5 * np.exp(rng.normal(0, 2, 2000))
    asked = np.sort(np.exp(rng.normal(0, 5, 500)))
    assert np.all(np.diff(expected(tables(scores, damage), asked)) >= 0)


def test_expected_damage_is_the_mean_where_scores_say_nothing_more() -> None:
    rng = np.random.default_rng(2)
    scores = np.repeat([0.01, 1.0, 100.0], 4000)
    means = np.repeat([1.0, 5.0, 300.0], 4000)
    damage = means * rng.exponential(1.0, scores.size)
    found = expected(tables(scores, damage), np.array([0.01, 1.0, 100.0]))
    # Means of 4000 exponentials are good to 1.6 %, three times that in the worst of three.
    assert found == pytest.approx([1.0, 5.0, 300.0], rel=0.05)


def test_a_violation_of_the_order_is_pooled() -> None:
    scores = np.repeat([1.0, 2.0], 1000)
    damage = np.repeat([3.0, 1.0], 1000)
    found = expected(tables(scores, damage), np.array([0.1, 1.0, 1.5, 2.0]))
    # One pseudo token among 2000.
    assert found == pytest.approx(2.0, rel=1e-3)


def test_unseen_tokens_are_not_free() -> None:
    rng = np.random.default_rng(3)
    scores = np.concatenate([np.full(500, 1e-20), rng.uniform(1, 2, 500)])
    damage = np.concatenate([np.zeros(500), rng.uniform(1, 2, 500)])
    damage[7] = 5.0  # one token that nobody had asked for and the future did need
    found = expected(tables(scores, damage), np.array([1e-20]))[0]
    assert found >= 5.0 / 501
    # Even where none of them was ever needed: as if one had been, like an average token.
    damage[7] = 0.0
    assert expected(tables(scores, damage), np.array([1e-20]))[0] == pytest.approx(
        1.5 / 501, rel=0.1
    )


def test_tokens_out_of_reach_do_not_dilute_the_table() -> None:
    scores, damage = np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0])
    bare = tables(scores, damage)
    padded = tables(np.concatenate([np.zeros(99), scores]), np.concatenate([np.zeros(99), damage]))
    np.testing.assert_array_equal(bare.log_scores, padded.log_scores)
    np.testing.assert_array_equal(bare.log_values, padded.log_values)
    nothing = tables(np.zeros(5), np.zeros(5))
    assert expected(nothing, np.array([0.5]))[0] < 1e-100


def test_damage_beyond_the_table_grows_with_the_score() -> None:
    fitted = tables(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 4.0]))
    at, beyond = expected(fitted, np.array([4.0, 40.0]))
    assert beyond == pytest.approx(10 * at)


def test_tables_belong_to_their_layer_head_and_quantity() -> None:
    rng = np.random.default_rng(4)
    scores = rng.uniform(1, 2, (2, 3, 200))
    future = {
        name: np.broadcast_to(
            10.0 ** (np.arange(2)[:, None, None] + 10 * np.arange(3)[None, :, None] + 100 * i),
            scores.shape,
        )
        for i, name in enumerate(QUANTITIES)
    }
    fitted = fit_tables(
        [scores[..., :90], scores[..., 90:]],
        [
            {name: values[..., :90] for name, values in future.items()},
            {name: values[..., 90:] for name, values in future.items()},
        ],
    )
    for name in QUANTITIES:
        assert fitted.expected(scores, name) == pytest.approx(future[name], rel=1e-9)


def test_a_table_of_other_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="starts"):
        CalibrationTables(np.zeros((1, 1, 2, 2), dtype=np.int64), np.zeros(1), np.zeros(1))
