"""The price of a set of drops: its laws, and what it is for errors that share a direction."""

import numpy as np
import pytest
import torch

from sphkv_cli.allocation.coherence import DROP_BOUNDS, Coherence
from sphkv_cli.allocation.output_error import HorizonAttention

from .test_estimators import context


def test_ratios_of_ample_evidence_are_the_measured_ones() -> None:
    summed = np.full((3, 2), 5.0)
    found = Coherence(summed * 7.0, summed).ratios()
    np.testing.assert_allclose(found, 7.0)


def test_a_head_that_hardly_hurts_gets_its_layers_ratio() -> None:
    summed = np.array([[1.0, 1e-9], [1.0, 1.0]])
    measured = np.array([[4.0, 1e-6], [16.0, 16.0]])
    found = Coherence(measured, summed).ratios()
    # Its own ratio is 1000, on next to no evidence; the layer's lies between 4 and the overall 10.
    assert 4 < found[0, 1] < 10
    assert found[0, 0] < found[1, 0]


def test_no_drops_change_no_price() -> None:
    nothing = Coherence(np.zeros((2, 2)), np.zeros((2, 2)))
    prices = np.array([[3.0, 8.0], [1.0, 2.0]])
    assert np.isnan(nothing.ratios()).all()
    np.testing.assert_array_equal(nothing.updated(prices, DROP_BOUNDS), prices)


def test_a_layer_without_drops_takes_the_ratio_of_all() -> None:
    summed, measured = np.array([[0.0, 0.0], [2.0, 2.0]]), np.array([[0.0, 0.0], [12.0, 12.0]])
    np.testing.assert_allclose(Coherence(measured, summed).ratios(), 6.0)


def test_updates_go_half_way_and_settle() -> None:
    summed = np.ones((2, 2))
    found = Coherence(summed * 32.0, summed)
    np.testing.assert_allclose(found.updated(np.full((2, 2), 8.0), DROP_BOUNDS), 16.0)
    np.testing.assert_allclose(found.updated(np.full((2, 2), 32.0), DROP_BOUNDS), 32.0)
    # A ratio below 1 is noise: drops never cancel for sure.
    low = Coherence(summed * 0.01, summed)
    np.testing.assert_allclose(low.updated(np.ones((2, 2)), DROP_BOUNDS), 1.0)


@pytest.mark.parametrize(
    ("shared", "at_least", "at_most"), [(True, 20.0, 160.0), (False, 0.3, 6.0)]
)
def test_tokens_that_share_a_direction_hurt_more_than_their_sum(
    shared: bool, at_least: float, at_most: float
) -> None:
    inputs = context()
    if shared:
        # Twenty tokens whose values all point one way, ten that point the other.
        inputs.values[:20] = 1.0
        inputs.values[20:] = -1.0
    inputs.queries.mul_(0.1)
    dropped = torch.zeros(30, 2, dtype=torch.bool)
    dropped[:20] = True
    measured = HorizonAttention.of(inputs).output_error(
        inputs.keys_framed[:30], inputs.values_framed[:30], dropped
    )
    ratio = float(measured.sum() / inputs.horizon_utility.drop[:, :20].sum())
    assert at_least < ratio < at_most
