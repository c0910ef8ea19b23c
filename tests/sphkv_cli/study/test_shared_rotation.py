"""Rotations per head: isometries of their own, and a statistic that scipy agrees with."""

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.evaluation.coding import ModelCacheShape
from sphkv_cli.study.calibration import block_code, mean_frames
from sphkv_cli.study.inputs import StudyInputs, StudyOptions
from sphkv_cli.study.shared_rotation import Comparison, TurnedCoding, read, run
from sphkv_codebooks.rotation import Rotation


def turned(capture: CaptureReader, bits: tuple[int, ...], seed: int) -> TurnedCoding:
    centred = mean_frames(capture, capture.documents_of("fit"), Rotation("none", capture.head_dim))
    shape = ModelCacheShape(capture.n_layers, capture.n_kv_heads, capture.head_dim)
    return TurnedCoding(
        "per head", block_code(capture.head_dim, bits, "fp16"), centred, shape, seed
    )


def test_each_head_has_a_rotation_of_its_own_that_is_undone(tiny_capture: CaptureReader) -> None:
    coding = turned(tiny_capture, (8, 8, 8, 8), 5)
    signs = coding.signs.reshape(-1, tiny_capture.head_dim)
    assert len({tuple(row.tolist()) for row in signs}) == len(signs)
    keys = torch.from_numpy(tiny_capture.keys(0, 1))
    values = torch.from_numpy(tiny_capture.values(0, 1))
    coded = coding.code(1, keys, values, torch.arange(len(keys)))
    # 8 bits an angle: what is left is a hundredth of the vector, so the frame was undone.
    assert float((coded.keys - keys).norm() / keys.norm()) < 0.02
    assert float((coded.values - values).norm() / values.norm()) < 0.02


def test_equal_vectors_of_two_heads_are_turned_apart(tiny_capture: CaptureReader) -> None:
    values = torch.from_numpy(tiny_capture.values(0, 0))
    same = values[:, :1].expand_as(values)
    coded = turned(tiny_capture, (4, 2, 2, 2), 5).code(0, values, same, torch.arange(160)).values
    assert not torch.equal(coded[:, 0], coded[:, 1])


def test_another_seed_is_another_rotation(tiny_capture: CaptureReader) -> None:
    values = torch.from_numpy(tiny_capture.values(0, 0))
    coded = [
        turned(tiny_capture, (4, 2, 2, 2), seed)
        .code(0, values, values, torch.arange(len(values)))
        .values
        for seed in (1, 1, 2)
    ]
    assert torch.equal(coded[0], coded[1])
    assert not torch.equal(coded[0], coded[2])


@pytest.mark.parametrize("shift", [0.0, 0.01, 0.02, 0.04, 0.2])
def test_a_difference_counts_as_the_paired_test_says(shift: float) -> None:
    rng = np.random.default_rng(8)
    shared = np.exp(0.05 * rng.standard_normal(8))
    per_head = shared * np.exp(shift + 0.03 * rng.standard_normal(8))
    found = Comparison("x", tuple(shared), tuple(per_head))
    test = ttest_rel(np.log(per_head), np.log(shared))
    assert found.is_different == (test.pvalue < 0.05)
    low, high = test.confidence_interval(0.95)
    assert (found.ratio.low, found.ratio.high) == pytest.approx((np.exp(low), np.exp(high)))


def test_the_reading_says_which_is_larger() -> None:
    shared = (1.0, 1.1, 0.9, 1.0)
    same = Comparison("output error", shared, (1.1, 1.0, 1.0, 0.9))
    first, second = read([same])
    assert "does not change the output error" in first
    assert "8.2 % (standard deviation" in second and "larger than" in second
    lower = Comparison("output error", shared, tuple(0.5 * x for x in shared))
    first, second = read([lower])
    assert "lowers the output error: x0.500" in first and "smaller than" in second


def test_the_study_runs_on_a_capture(tiny_capture: CaptureReader) -> None:
    result = run(StudyInputs(StudyOptions(max_queries=8), tiny_capture))
    assert [row[0] for row in result.tables[0].rows][-1] == "output error"
    assert len(result.tables[1].rows) == 6
