"""Laws of the int8 code: error of a coordinate at most half a scale, no clipping, exact zeros."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sphkv_kernels.int8_code import decode_int8, encode_int8


@given(seed=st.integers(0, 2**31), log_scale=st.floats(-12, 12))
def test_error_is_at_most_half_the_stored_scale(seed: int, log_scale: float) -> None:
    x = torch.randn(17, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x * 2.0**log_scale
    stored = encode_int8(x)
    error = (decode_int8(stored) - x).abs().amax(-1)
    assert bool((error <= stored.scales.to(torch.float64) * (0.5 + 1e-9)).all())
    # fp16 spaces its normal numbers 2^-10 apart, its subnormal ones 2^-24.
    ideal = x.abs().amax(-1) / 127
    assert bool((stored.scales.to(torch.float64) <= ideal * (1 + 2**-10) + 2**-24).all())


def test_zero_vectors_stay_exactly_zero() -> None:
    stored = encode_int8(torch.zeros(2, 16))
    assert torch.equal(decode_int8(stored), torch.zeros(2, 16, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = torch.zeros(2, 16)
    x[1, 3] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        encode_int8(x)


def test_a_scale_beyond_fp16_is_refused() -> None:
    with pytest.raises(ValueError, match="keep this vector dense"):
        encode_int8(torch.full((1, 16), 1e9))
