"""Integers per token and fp8, against what their formats can say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_codebooks.comparators.float8 import Float8
from sphkv_codebooks.comparators.integer import IntegerPerToken
from sphkv_codebooks.errors import CodeError

# Every finite value of e4m3: exponent bias 7, exponent 15 with mantissa 7 is NaN.
_SUBNORMAL = [m / 8 * 2.0**-6 for m in range(8)]
_NORMAL = [
    (1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if not (e == 15 and m == 7)
]
E4M3 = np.array(sorted({s * v for s in (-1, 1) for v in _SUBNORMAL + _NORMAL}))


def vectors(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 8]), st.floats(0.1, 1000))
def test_integers_err_by_half_a_step_of_their_own_vector(seed: int, bits: int, size: float) -> None:
    x = vectors(seed, 9, 32) * size
    largest = x.abs().amax(-1, keepdim=True)
    decoded = IntegerPerToken(bits).reconstruct(x)
    step = largest / (2 ** (bits - 1) - 1)
    # The fp16 scale moves the end of the range by 2^-11 of it.
    assert ((decoded - x).abs() <= 0.5 * step + 2**-11 * largest).all()
    levels = decoded / (decoded.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1))
    assert (levels - levels.round()).abs().max() < 1e-9


def test_int4_has_fifteen_levels_and_int8_is_far_better() -> None:
    x = vectors(0, 1, 4096)
    assert IntegerPerToken(4).reconstruct(x).unique().numel() <= 15
    errors = [float((IntegerPerToken(b).reconstruct(x) - x).square().mean()) for b in (4, 8)]
    # 127/7 = 18 times the levels: 329 times less error.
    assert errors[0] / errors[1] == pytest.approx((127 / 7) ** 2, rel=0.1)


def test_e4m3_rounds_to_the_nearest_value_of_the_format() -> None:
    generator = np.random.default_rng(1)
    x = generator.standard_normal(4000) * 2.0 ** generator.uniform(-12, 9, 4000)
    x = np.clip(x, -448, 448)
    decoded = Float8(has_scale=False).reconstruct(torch.from_numpy(x)[None])[0].numpy()
    assert np.isin(decoded, E4M3).all()
    nearest = np.abs(x[:, None] - E4M3).min(-1)
    # torch casts float64 through float32: an error of 2^-24 of the value may flip a tie.
    assert (np.abs(decoded - x) <= nearest + 2.0**-23 * np.abs(x)).all()


def test_e4m3_saturates_without_scale_and_does_not_with_one() -> None:
    x = torch.tensor([[1000.0, -5000.0, 448.0, 1.0]])
    expected = torch.tensor([[448.0, -448.0, 448.0, 1.0]])
    assert torch.equal(Float8(has_scale=False).reconstruct(x), expected)
    scaled = Float8(has_scale=True).reconstruct(x)
    # 3 bits of mantissa: 2^-4 relative, and the fp16 scale.
    torch.testing.assert_close(scaled, x, rtol=2**-4 + 2**-10, atol=5000 / 448 * 2**-10)


def test_the_scale_rescues_small_vectors_from_underflow() -> None:
    x = vectors(2, 20, 64) * 2.0**-11
    without, scaled = (
        float((Float8(s).reconstruct(x) - x).square().sum() / x.square().sum())
        for s in (False, True)
    )
    assert scaled < 0.001 and without > 0.2


def test_rates() -> None:
    assert IntegerPerToken(4).rate(64, 7) == 4.25
    assert IntegerPerToken(8).rate(128, 7) == 8.125
    assert Float8(has_scale=False).rate(64, 7) == 8.0
    assert Float8(has_scale=True).rate(64, 7) == 8.25


def test_settings_that_mean_nothing_are_refused() -> None:
    for bits in (1, 9):
        with pytest.raises(CodeError):
            IntegerPerToken(bits)
    with pytest.raises(CodeError, match="fp16"):
        IntegerPerToken(4).reconstruct(torch.full((1, 4), 1e7))
