"""DRIVE and EDEN: each scale keeps the promise that it is named for."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_codebooks.comparators.coordinate_codebook import GAUSSIAN, coordinate_codebook
from sphkv_codebooks.comparators.eden import GAINS, Eden
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.rotation import Rotation

# d -> inf, 1 to 4 bits
LEAST_SQUARES = {1: 0.3634, 2: 0.11748, 3: 0.03455, 4: 0.00950}
UNBIASED = {1: 0.5708, 2: 0.13312, 3: 0.03578, 4: 0.00959}

# fp16 keeps 11 significant bits: a stored scale is off by 2^-11 at most, relative.
FP16 = 2**-11


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def vnmse(x: torch.Tensor, decoded: torch.Tensor) -> float:
    return float(((x - decoded).square().sum(-1) / x.square().sum(-1)).mean())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_vnmse_in_the_limit_is_the_published_one(bits: int) -> None:
    d = coordinate_codebook(GAUSSIAN, bits).distortion
    assert d == pytest.approx(LEAST_SQUARES[bits], abs=5.1e-5 if bits == 1 else 5.1e-6)
    assert d / (1 - d) == pytest.approx(UNBIASED[bits], abs=5.1e-5 if bits == 1 else 5.1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_measured_vnmse_is_the_published_one(bits: int) -> None:
    # Gaussian vectors are isotropic as they are; at d = 4096 the limit is 0.03 % away.
    x = gaussian(bits, 250, 4096)
    for gain, table in (("least_squares", LEAST_SQUARES), ("unbiased", UNBIASED)):
        decoded = Eden(bits, 4096, gain).reconstruct(x)
        # A vector's own error scatters by 1 to 4 %, the mean of 250 by 0.25 % at most; the
        # table's last digit is worth another 0.06 %.
        assert vnmse(x, decoded) == pytest.approx(table[bits], rel=0.01)


def any_vectors(seed: int, tail: float) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    # Heavy tails on purpose: the identities hold for every vector, not on average.
    x = generator.standard_normal((5, 32)) * np.exp(tail * generator.standard_normal((5, 32)))
    return torch.from_numpy(x)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0.0, 1.5))
def test_every_scale_keeps_its_promise_for_every_vector(seed: int, bits: int, tail: float) -> None:
    x = any_vectors(seed, tail)
    rotation = Rotation("hadamard", 32, seed % 1000)
    decoded = {gain: Eden(bits, 32, gain, rotation).reconstruct(x) for gain in GAINS}
    energy = x.square().sum(-1)
    unbiased, least, matched = (decoded[g] for g in ("unbiased", "least_squares", "matched_norm"))
    slack = 1.5 * FP16
    assert ((x * unbiased).sum(-1) / energy - 1).abs().max() < slack
    assert (((x - least) * least).sum(-1) / energy).abs().max() < slack
    assert (matched.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max() < slack
    errors = {g: (x - y).square().sum(-1) / energy for g, y in decoded.items()}
    # At its minimum the error is flat: a scale off by 2^-11 costs 2^-22 of the energy.
    assert (errors["least_squares"] <= errors["unbiased"] + FP16**2).all()
    assert (errors["least_squares"] <= errors["matched_norm"] + FP16**2).all()


def test_only_the_unbiased_scale_is_unbiased_over_rotations() -> None:
    n_rotations = 800
    x = any_vectors(3, 1.0)[:1, :16]
    mean = {gain: torch.zeros_like(x) for gain in GAINS}
    error = dict.fromkeys(GAINS, 0.0)
    for seed in range(n_rotations):
        rotation = Rotation("haar", 16, seed)
        for gain in GAINS:
            decoded = Eden(1, 16, gain, rotation).reconstruct(x)
            mean[gain] += decoded / n_rotations
            error[gain] += vnmse(x, decoded) / n_rotations
    for gain in GAINS:
        # An unbiased mean of n is off by vNMSE / n, give or take a third of it in 16 directions.
        noise = error[gain] / n_rotations
        bias = vnmse(x, mean[gain])
        if gain == "unbiased":
            assert bias < 2.5 * noise
        else:
            assert bias > 20 * noise


def test_drive_is_the_sign_times_the_mean_magnitude() -> None:
    x = gaussian(5, 7, 64)
    least = Eden(1, 64, "least_squares").reconstruct(x)
    expected = x.sign() * x.abs().mean(-1, keepdim=True)
    torch.testing.assert_close(least, expected, rtol=2 * FP16, atol=0)
    unbiased = Eden(1, 64, "unbiased").reconstruct(x)
    expected = x.sign() * x.square().sum(-1, keepdim=True) / x.abs().sum(-1, keepdim=True)
    torch.testing.assert_close(unbiased, expected, rtol=2 * FP16, atol=0)


def test_matched_norm_lies_between_the_other_two() -> None:
    x = gaussian(6, 50, 64)
    least, unbiased, matched = (
        Eden(2, 64, gain).reconstruct(x).norm(dim=-1)
        for gain in ("least_squares", "unbiased", "matched_norm")
    )
    assert (least < matched).all() and (matched < unbiased).all()
    torch.testing.assert_close(matched, (least * unbiased).sqrt(), rtol=2 * FP16, atol=0)


def test_rate_and_refusals() -> None:
    assert Eden(3, 128, "unbiased").rate(128, 1) == 3.125
    assert math.isclose(Eden(1, 64, "unbiased").rate(64, 9), 1.25)
    with pytest.raises(CodeError, match="least_squares"):
        Eden(3, 128, "best")  # type: ignore[arg-type]
    with pytest.raises(CodeError):
        Eden(0, 128, "unbiased")
