"""KIVI against its definition written as loops, and its groups against each other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_codebooks.comparators.kivi import KiviKeys, KiviValues
from sphkv_codebooks.errors import CodeError


def vectors(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def one_group(values: np.ndarray, bits: int) -> np.ndarray:
    """Equation 1 of KIVI on a 1-D group, parameters in fp16."""
    zero = np.float64(np.float16(values.min()))
    scale = np.float64(np.float16((values.max() - zero) / (2**bits - 1)))
    if scale == 0:
        return np.full_like(values, zero)
    return zero + scale * np.clip(np.rint((values - zero) / scale), 0, 2**bits - 1)


@pytest.mark.parametrize("bits", [2, 4])
def test_keys_are_coded_per_channel_in_groups_of_tokens(bits: int) -> None:
    keys = vectors(bits, 70, 5)
    expected = keys.numpy().copy()
    for start in (0, 32):
        for channel in range(5):
            run = slice(start, start + 32)
            expected[run, channel] = one_group(expected[run, channel], bits)
    decoded = KiviKeys(bits).reconstruct(keys)
    torch.testing.assert_close(decoded, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    assert torch.equal(decoded[64:], keys[64:])


@pytest.mark.parametrize("bits", [2, 4])
def test_values_are_coded_per_token_in_groups_of_channels(bits: int) -> None:
    values = vectors(bits, 3, 64)
    expected = values.numpy().copy()
    for token in range(3):
        for start in (0, 32):
            run = slice(start, start + 32)
            expected[token, run] = one_group(expected[token, run], bits)
    decoded = KiviValues(bits).reconstruct(values)
    torch.testing.assert_close(decoded, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 4, 8]), st.floats(-50, 50))
def test_error_is_at_most_half_a_step(seed: int, bits: int, bias: float) -> None:
    keys = vectors(seed, 32, 6) + bias
    span = keys.amax(0) - keys.amin(0)
    error = (KiviKeys(bits).reconstruct(keys) - keys).abs().amax(0)
    # fp16 moves the two ends of the range by 2^-11 of the minimum and of the span.
    slack = 2**-11 * (keys.abs().amax(0) + span)
    assert (error <= 0.5 * span / (2**bits - 1) + slack).all()


def test_an_outlier_channel_costs_the_other_channels_nothing() -> None:
    keys = vectors(1, 64, 8)
    louder = keys.clone()
    louder[:, 3] *= 1000
    others = [c for c in range(8) if c != 3]
    quiet, loud = KiviKeys(2).reconstruct(keys), KiviKeys(2).reconstruct(louder)
    assert torch.equal(quiet[:, others], loud[:, others])
    # The same channel inside a token's group ruins its neighbours: why keys go per channel.
    values, spoiled = vectors(2, 64, 32), vectors(2, 64, 32)
    spoiled[:, 3] *= 1000
    rest = [c for c in range(32) if c != 3]
    error = (KiviValues(2).reconstruct(values) - values)[:, rest].square().mean()
    worse = (KiviValues(2).reconstruct(spoiled) - spoiled)[:, rest].square().mean()
    assert worse > 5 * error


def test_a_constant_channel_comes_back_exactly() -> None:
    keys = vectors(3, 32, 4)
    keys[:, 2] = -1.5
    assert torch.equal(KiviKeys(2).reconstruct(keys)[:, 2], keys[:, 2])


@pytest.mark.parametrize("n_tokens", [1, 31])
def test_keys_that_fill_no_group_stay_as_they_are(n_tokens: int) -> None:
    keys = vectors(4, n_tokens, 8)
    assert torch.equal(KiviKeys(2).reconstruct(keys), keys)
    assert KiviKeys(2).rate(8, n_tokens) == 16.0


def test_the_newest_values_can_stay_dense() -> None:
    values = vectors(5, 10, 32)
    decoded = KiviValues(2, residual_length=4).reconstruct(values)
    assert torch.equal(decoded[6:], values[6:])
    assert torch.equal(decoded[:6], KiviValues(2).reconstruct(values[:6]))
    assert torch.equal(KiviValues(2, residual_length=40).reconstruct(values), values)


def test_a_longer_residual_waits_for_whole_runs_of_groups() -> None:
    keys = vectors(6, 200, 4)
    decoded = KiviKeys(2, residual_length=128).reconstruct(keys)
    assert torch.equal(decoded[128:], keys[128:])
    assert torch.equal(decoded[:128], KiviKeys(2).reconstruct(keys[:128]))


def test_rates_are_bits_plus_32_over_the_group() -> None:
    for bits, rate in ((2, 3.0), (4, 5.0)):
        assert KiviKeys(bits).rate(128, 1024) == rate
        assert KiviValues(bits).rate(128, 1000) == rate
    assert KiviKeys(2).rate(128, 33) == pytest.approx((3 * 32 + 16) / 33)
    assert KiviKeys(2, residual_length=128).rate(64, 200) == pytest.approx(
        (3 * 128 + 16 * 72) / 200
    )
    assert KiviValues(2, residual_length=10).rate(64, 20) == pytest.approx((3 + 16) / 2)


def test_settings_that_mean_nothing_are_refused() -> None:
    for build in (
        lambda: KiviKeys(0),
        lambda: KiviKeys(2, residual_length=48),
        lambda: KiviValues(2, residual_length=-1),
        lambda: KiviValues(2).reconstruct(torch.ones(3, 48)),
        lambda: KiviValues(2).rate(48, 3),
    ):
        with pytest.raises(CodeError):
            build()
    with pytest.raises(CodeError, match="fp16"):
        KiviKeys(2).reconstruct(torch.full((32, 4), 1e6))
