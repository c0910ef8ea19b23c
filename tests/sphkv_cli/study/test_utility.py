"""Estimators against the oracle: the measures by scipy, and what must hold on a known capture."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.study.inputs import StudyInputs, StudyOptions
from sphkv_cli.study.result import StudyResult
from sphkv_cli.study.utility import run, spearman, top_overlap
from sphkv_cli.study.utility_scores import ESTIMATORS

Row = tuple[float, ...]


@pytest.fixture(scope="module")
def found(tiny_capture: CaptureReader) -> StudyResult:
    return run(StudyInputs(StudyOptions(), tiny_capture))


@pytest.fixture(scope="module")
def rows(found: StudyResult) -> dict[tuple[object, object], Row]:
    """(rank, overlap, predicted, true, regret, layer regret) by (score, keys)."""
    return {(row[0], row[1]): tuple(row[2:]) for row in found.tables[0].rows}


def test_rank_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.random((2, 3, 4, 50)).round(1)
    for index in np.ndindex(3, 4):
        expected = spearmanr(one[index], other[index]).statistic
        assert spearman(one, other)[index] == pytest.approx(expected, abs=1e-12)
    assert (spearman(np.ones((2, 9)), other[0, :2, :9]) == 0).all()


def test_overlap_counts_shared_top_tokens() -> None:
    truth = np.arange(20.0)
    assert top_overlap(truth**3, truth, 0.1) == 1
    assert top_overlap(-truth, truth, 0.1) == 0
    half = truth.copy()
    half[19] = -1
    assert top_overlap(half, truth, 0.1) == 0.5


def test_no_score_beats_the_oracle_by_more_than_pages_allow(
    rows: dict[tuple[object, object], Row],
) -> None:
    oracle = rows["oracle", "exact"]
    assert oracle[2] == oracle[3]
    for name in ESTIMATORS:
        rank, overlap, _, _, regret, _ = rows[name, "exact"]
        assert -1 <= rank < 1
        assert 0 <= overlap <= 1
        # Pages are cut by the score: another cut than the oracle's can only help by accident.
        assert regret > 0.95


def test_scores_that_look_at_keys_suffer_from_coding_and_others_do_not(
    rows: dict[tuple[object, object], Row],
) -> None:
    for name in ("recency", "value-norm"):
        assert rows[name, "exact"] == rows[name, "2 bits"]
    for name in ("combination", "window", "calibration-queries"):
        ranks = [rows[name, keys][0] for keys in ("exact", "4 bits", "2 bits")]
        assert ranks[0] > ranks[2]
        assert ranks[1] == pytest.approx(ranks[0], abs=0.05)


def test_the_combination_orders_best(rows: dict[tuple[object, object], Row]) -> None:
    ranks = {name: rows[name, "exact"][0] for name in ESTIMATORS}
    # Fitted on other documents: within noise of the best single score, far above the poor ones.
    assert ranks["combination"] > max(ranks.values()) - 0.03
    assert ranks["combination"] > ranks["recency"] + 0.2


def test_every_layer_has_its_row_and_the_reading_its_numbers(found: StudyResult) -> None:
    assert [row[0] for row in found.tables[1].rows] == [0, 1]
    combination = next(row for row in found.tables[0].rows if row[:2] == ("combination", "exact"))
    assert f"{combination[2]:.3f}" in found.reading[0]
    assert f"{combination[6]:.2f}x" in found.reading[1]
