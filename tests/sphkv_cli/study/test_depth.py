"""The depth study against closed forms."""

import math

import numpy as np
import pytest
import torch

from sphkv_cli.study.depth import best_split, level_spread


@pytest.mark.parametrize(("level", "std"), [(1, math.pi / math.sqrt(3)), (2, 0.34183), (7, 0.0625)])
def test_spread_is_that_of_the_density(level: int, std: float) -> None:
    # The middles of 20,000 quantiles miss the tails: 1e-3 relative.
    assert level_spread(level)[0] == pytest.approx(std, rel=1e-3)


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_bits_add_up_and_the_closed_form_is_what_gaussian_vectors_show(depth: int) -> None:
    point = best_split(64, depth, 3.0, torch.Generator().manual_seed(1))
    assert point.angle_rate + point.radius_rate == pytest.approx(point.design.rate)
    angles = sum((64 >> i) * np.log2(n) for i, n in enumerate(point.design.n_cells, start=1))
    assert point.angle_rate == pytest.approx(angles / 64)
    assert point.design.rate <= 3.0
    # 4096 vectors: D of one vector spreads by about its own size / 4.
    assert point.measured == pytest.approx(point.design.distortion, rel=0.03)
    assert math.isnan(point.with_fp16) or point.with_fp16 >= point.design.distortion - 1e-12
