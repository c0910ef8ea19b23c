"""What a frame costs: nothing, bytes, or decode time, in factors of a squared error."""

import numpy as np
import pytest

from sphkv_cli.fit.frame_price import POSITION_BITS, TABLE_CONTEXT, TIME_WEIGHT, frame_price
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation
from sphkv_kernels.decode_cost import POSITION_TERM_SHARES

HEAD_DIM = 128
RATE = 3.25
ROTATION = Rotation("none", HEAD_DIM)


def before_rope(n_pairs: int) -> FrameSet:
    mean = np.zeros((1, 1, HEAD_DIM), np.float32)
    mean[..., :n_pairs] = 1.0
    inv_freq = (10000.0 ** -np.linspace(0, 1, HEAD_DIM // 2)).astype(np.float32)[None]
    return FrameSet(ROTATION, "pre_rope", mean, inv_freq=inv_freq)


def test_what_needs_neither_bytes_nor_time_is_free() -> None:
    mean = np.ones((1, 1, HEAD_DIM), np.float32)
    assert frame_price(FrameSet(ROTATION), RATE) == 1.0
    assert frame_price(FrameSet(ROTATION, "post_rope", mean), RATE) == 1.0


@pytest.mark.parametrize("n_pairs", [4, 8, 16, 32])
def test_pairs_cost_the_bits_that_their_time_would_read(n_pairs: int) -> None:
    found = np.log(frame_price(before_rope(n_pairs), RATE)) / np.log(4)
    time_bits = TIME_WEIGHT * POSITION_TERM_SHARES[n_pairs] * RATE
    assert found == pytest.approx(POSITION_BITS / HEAD_DIM + time_bits, rel=1e-12)


def test_every_step_of_pairs_costs_more_and_more_so_at_higher_rates() -> None:
    prices = [frame_price(before_rope(n), RATE) for n in (4, 8, 16, 32, 64)]
    assert prices == sorted(set(prices))
    assert frame_price(before_rope(8), 2 * RATE) > frame_price(before_rope(8), RATE)
    # The kernel pads: pairs between two steps take the time of the larger.
    assert frame_price(before_rope(5), RATE) == frame_price(before_rope(8), RATE)


def test_a_full_balancing_is_shared_out_over_the_tokens() -> None:
    full = np.linalg.qr(np.random.default_rng(3).standard_normal((HEAD_DIM, HEAD_DIM)))[0]
    price = frame_price(FrameSet(ROTATION, balancing=full[None, None]), RATE)
    # A matrix and its inverse or just one, in at least 16 bits a number.
    assert price >= 4.0 ** (16 * HEAD_DIM**2 / TABLE_CONTEXT / HEAD_DIM) * (1 - 1e-9)
    assert price < 1.5 * 4.0 ** (64 * HEAD_DIM / TABLE_CONTEXT)
