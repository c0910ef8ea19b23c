"""Wu et al.'s PolarQuant against its definition, pair by pair."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_codebooks.comparators.wu_polar import WuPolarQuant
from sphkv_codebooks.errors import CodeError


def vectors(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def middle(value: float, lowest: float, highest: float, bits: int) -> float:
    zero = float(np.float16(lowest))
    scale = float(np.float16((highest - zero) / 2**bits))
    if scale == 0:
        return zero
    cell = min(max(math.floor((value - zero) / scale), 0), 2**bits - 1)
    return zero + scale * (cell + 0.5)


def test_each_pair_goes_to_the_middle_of_its_cell() -> None:
    method = WuPolarQuant(3, 4, group_size=8)
    keys = vectors(0, 19, 6)
    expected = keys.clone()
    for start in (0, 8):
        for j in range(3):
            pairs = [(float(keys[t, j]), float(keys[t, j + 3])) for t in range(start, start + 8)]
            radii = [math.hypot(a, b) for a, b in pairs]
            angles = [math.atan2(b, a) % (2 * math.pi) for a, b in pairs]
            for t in range(8):
                r = middle(radii[t], min(radii), max(radii), 3)
                phi = middle(angles[t], min(angles), max(angles), 4)
                expected[start + t, j] = r * math.cos(phi)
                expected[start + t, j + 3] = r * math.sin(phi)
    torch.testing.assert_close(method.reconstruct(keys), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(method.reconstruct(keys)[16:], keys[16:])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(2, 6))
def test_error_is_bounded_by_half_a_cell_of_radius_and_of_angle(
    seed: int, radius_bits: int, angle_bits: int
) -> None:
    keys = vectors(seed, 32, 8)
    method = WuPolarQuant(radius_bits, angle_bits, group_size=32)
    error = method.reconstruct(keys) - keys
    radius = torch.hypot(keys[:, :4], keys[:, 4:])
    span = radius.amax(0) - radius.amin(0)
    # fp16 shifts a range's ends by 2^-11 of the largest value, 2 pi for the angle.
    dr = 0.5 * span / 2**radius_bits + 2**-10 * radius.amax(0)
    dphi = 2 * math.pi * (0.5 / 2**angle_bits + 2**-10)
    bound = dr + radius * 2 * math.sin(min(dphi, math.pi) / 2)
    assert (torch.hypot(error[:, :4], error[:, 4:]) <= bound + 1e-12).all()


def test_a_key_bias_is_harmless_except_at_the_seam_of_the_angle() -> None:
    # What the method is for: a large offset narrows the angle and keeps the radius's span.
    keys = vectors(1, 128, 8)

    def error(channel: int, bias: float) -> float:
        biased = keys.clone()
        biased[:, channel] += bias
        return float((WuPolarQuant().reconstruct(biased) - biased).square().mean())

    plain = error(2, 0.0)
    for channel, bias in ((2, -40.0), (6, 40.0), (6, -40.0)):
        assert error(channel, bias) < 1.3 * plain
    # At angle 0 the pair straddles 0 and 2 pi, and the published range takes the whole circle.
    assert error(2, 40.0) > 100 * plain


def test_constant_pairs_come_back() -> None:
    keys = torch.zeros(128, 4, dtype=torch.float64)
    keys[:, 0], keys[:, 2] = 3.0, 0.0
    decoded = WuPolarQuant().reconstruct(keys)
    assert torch.equal(decoded, keys)


def test_pairs_are_the_halves_of_the_head() -> None:
    keys = torch.zeros(128, 8, dtype=torch.float64)
    keys[:, 1], keys[:, 5] = vectors(2, 128, 2).unbind(-1)
    decoded = WuPolarQuant().reconstruct(keys)
    silent = [0, 2, 3, 4, 6, 7]
    assert torch.equal(decoded[:, silent], keys[:, silent])
    assert (decoded[:, [1, 5]] - keys[:, [1, 5]]).square().mean() < 0.05


def test_rates_are_the_papers() -> None:
    assert WuPolarQuant(4, 4).rate(128, 1024) == 4.25
    assert WuPolarQuant(3, 3).rate(64, 256) == 3.25
    assert WuPolarQuant(4, 4).rate(64, 129) == pytest.approx((4.25 * 128 + 16) / 129)


def test_settings_that_mean_nothing_are_refused() -> None:
    for build in (
        lambda: WuPolarQuant(0, 4),
        lambda: WuPolarQuant(4, 9),
        lambda: WuPolarQuant(group_size=0),
        lambda: WuPolarQuant().reconstruct(torch.ones(4, 7)),
    ):
        with pytest.raises(CodeError):
            build()
