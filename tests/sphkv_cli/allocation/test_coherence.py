"""The price of a set of drops: its laws, and what it is for errors that share a direction."""

import numpy as np
import pytest
import torch

from sphkv_cli.allocation.coherence import (
    DROP_BOUNDS,
    Coherence,
    PlanCoherence,
    measure_coherence,
)
from sphkv_cli.allocation.output_error import HorizonAttention
from sphkv_cli.allocation.stage import AllocationRun
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.codebooks import CodebooksReader
from sphkv_cli.progress import NullProgress

from .conftest import OPTIONS, Chain
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


def test_planned_sets_are_measured_apart(chain: Chain) -> None:
    """Coding everything drops nothing; dropping everything codes nothing; a mixture is both."""
    books = CodebooksReader.open(chain.codebooks)
    with CaptureReader(chain.capture) as capture:
        run = AllocationRun.prepare(OPTIONS, capture, books, NullProgress())
        document = run.measure(capture.documents_of("fit")[0])
        assert document.horizon is not None
        shape = document.horizon.drop.shape

        def measured(plan: np.ndarray) -> PlanCoherence:
            tiers, weights = run.layout.tiers, run.head_weights
            return measure_coherence(
                capture, document, run.frames, tiers, plan, weights, NullProgress()
            )

        lowest = measured(np.ones(shape, dtype=np.int8))
        nothing = measured(np.zeros(shape, dtype=np.int8))
        mixed = np.ones(shape, dtype=np.int8)
        mixed[..., ::2] = 0
        both = measured(mixed)
    for layer in range(shape[0]):
        cost = document.errors.token_costs(0, layer, document.horizon)
        np.testing.assert_allclose(lowest.codes.summed[layer], cost.sum(-1))
        np.testing.assert_allclose(both.codes.summed[layer], cost[:, 1::2].sum(-1))
    np.testing.assert_allclose(nothing.drops.summed, document.horizon.drop.sum(-1))
    np.testing.assert_allclose(both.drops.summed, document.horizon.drop[..., ::2].sum(-1))
    # Coding and dropping of nothing at all leave no error but rounding of the logits.
    assert (lowest.drops.measured < 1e-9 * nothing.drops.measured).all()
    assert (nothing.codes.measured < 1e-9 * lowest.codes.measured).all()
    assert (both.codes.measured < lowest.codes.measured).all()
    # First order on a capture of independent errors: right to a factor of a few.
    assert (np.abs(np.log(lowest.codes.ratios())) < np.log(6)).all()
