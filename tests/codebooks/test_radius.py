"""Radius codings: their values, rounding, limits, and the bits they take."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.radius import (
    Fp16Radius,
    LloydMaxRadius,
    MinifloatRadius,
    NormRadius,
    RadiusCoding,
    StoredRadii,
    radius_coding_from_spec,
)
from sphkv_codebooks.radius_density import RadiusDensity


def radii_and_norms(seed: int, n_radii: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(50, n_radii, 16, generator=torch.Generator().manual_seed(seed)) * 3
    return x.norm(dim=-1), x.flatten(1).norm(dim=-1)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("block_dim", "head_dim"), [(16, 64), (2, 128), (16, None)])
def test_radius_book_meets_both_optimality_conditions(
    bits: int, block_dim: int, head_dim: int | None
) -> None:
    coding = LloydMaxRadius.design(bits, block_dim, head_dim)
    middles = 0.5 * (coding.centroids[1:] + coding.centroids[:-1])
    np.testing.assert_allclose(coding.thresholds, middles, atol=1e-8)
    density = RadiusDensity(block_dim, head_dim)
    edges = np.concatenate([[0.0], coding.thresholds, [density.upper]])
    _, offset, _ = density.partial_moments(edges[:-1], edges[1:], coding.centroids)
    np.testing.assert_allclose(offset, 0.0, atol=1e-9)
    # At the optimum E[rho rhohat] = E rhohat^2 (rhohat is a conditional mean).
    moments = coding.moments(block_dim, head_dim)  # type: ignore[arg-type]
    assert moments.correlation == pytest.approx(moments.mean_square, abs=1e-9)
    assert moments.mean_square < 1.0


def test_lloyd_max_code_is_the_nearest_centroid() -> None:
    radii, norms = radii_and_norms(1)
    coding = LloydMaxRadius.design(3, 16, 128)
    stored = coding.encode(radii, norms)
    assert stored.codes is not None
    rho = (radii / norms[:, None] * math.sqrt(8)).double().numpy()
    nearest = np.abs(rho[..., None] - coding.centroids).argmin(-1)
    gap = np.abs(rho[..., None] - coding.thresholds).min(-1)
    clear = gap > 1e-6
    assert (stored.codes.numpy() == nearest)[clear].all()
    decoded = coding.decode(stored, torch.float64)
    assert stored.norms is not None
    expected = coding.centroids[stored.codes.numpy()] / math.sqrt(8)
    np.testing.assert_allclose(
        decoded.numpy(), expected * stored.norms.double().numpy()[:, None], rtol=1e-12
    )


@pytest.mark.parametrize(
    ("exponent_bits", "mantissa_bits"), [(5, 6), (5, 3), (5, 10), (4, 4), (2, 1)]
)
def test_minifloat_values_are_float16_values(exponent_bits: int, mantissa_bits: int) -> None:
    """Shifted to its place, a code is the float16 number of that value (bias aside)."""
    coding = MinifloatRadius(exponent_bits, mantissa_bits)
    values = coding.values
    assert values[0] == 0.0
    assert (np.diff(values) > 0).all()
    assert (values.astype(np.float16).astype(np.float64) == values).all()
    if exponent_bits == 5:
        codes = np.arange(values.size, dtype=np.uint16)
        shifted = (codes << (10 - mantissa_bits)).astype(np.uint16).view(np.float16)
        assert (shifted.astype(np.float64) == values).all()
        assert np.isfinite(shifted).all()
    assert values.size <= 2**coding.bits_per_radius


@given(st.floats(0.0, 1e5, width=32), st.sampled_from([(5, 6), (5, 3), (4, 4), (3, 2)]))
@settings(max_examples=300, deadline=None)
def test_minifloat_rounds_to_nearest_halves_up_and_saturates(
    value: float, shape: tuple[int, int]
) -> None:
    coding = MinifloatRadius(*shape)
    stored = coding.encode(torch.tensor([value]), torch.tensor(1.0))
    assert stored.codes is not None
    assert stored.codes.dtype == torch.int16
    got = float(coding.decode(stored, torch.float64))
    gaps = np.abs(coding.values - min(value, coding.largest))
    best = np.flatnonzero(gaps == gaps.min())[-1]  # the upper one of two equally near
    assert got == coding.values[best]


def test_minifloat_rounding_of_bits_matches_integer_arithmetic() -> None:
    """For 5 exponent bits: code = (float32 bits + half) >> shift, less the bias difference; below
    2^-14 code = floor(r 2^(14 + m) + 1/2). A kernel may use either form."""
    m = 6
    coding = MinifloatRadius(5, m)
    r = torch.rand(20_000, generator=torch.Generator().manual_seed(2)) * 100
    r = torch.cat([r, r * 1e-6, torch.from_numpy(coding.values[:-1]).float()])
    stored = coding.encode(r, torch.tensor(1.0))
    bits = r.numpy().view(np.uint32).astype(np.int64)
    normal = ((bits + (1 << (22 - m))) >> (23 - m)) - (112 << m)
    subnormal = np.floor(r.numpy().astype(np.float64) * 2.0 ** (14 + m) + 0.5).astype(np.int64)
    expected = np.where(r.numpy() < 2.0**-14, subnormal, normal)
    assert stored.codes is not None
    assert (stored.codes.numpy() == expected).all()


@pytest.mark.parametrize("coding", [Fp16Radius(), NormRadius()], ids=lambda c: c.spec)
def test_float16_radii_keep_eleven_bits(coding: RadiusCoding) -> None:
    radii, norms = radii_and_norms(3, 1)
    decoded = coding.decode(coding.encode(radii, norms), torch.float64)
    assert ((decoded - radii).abs() <= radii * 2.0**-11).all()


@pytest.mark.parametrize(
    "spec", ["fp16", "norm", "lloyd_max:1", "lloyd_max:8", "minifloat:5,6", "minifloat:4,3"]
)
def test_spec_reads_back(spec: str) -> None:
    assert radius_coding_from_spec(spec, 16, 128).spec == spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fp8", "'fp8' is unknown: use fp16"),
        ("", "'' is unknown"),
        ("fp16:3", "unknown"),
        ("lloyd_max", "unknown"),
        ("lloyd_max:x", "1 to 8 bits|unknown"),
        ("lloyd_max:0", "1 to 8 bits, not 0"),
        ("lloyd_max:9", "not 9"),
        ("minifloat:5", "unknown"),
        ("minifloat:6,3", "minifloat:6,3 is out of range"),
        ("minifloat:5,11", "out of range"),
    ],
)
def test_unknown_radius_codings_are_refused(spec: str, message: str) -> None:
    with pytest.raises(CodeError, match=message):
        radius_coding_from_spec(spec, 16, 128)


def test_bad_radius_books_are_refused() -> None:
    with pytest.raises(CodeError, match="2-bit radius book has 4 centroids"):
        LloydMaxRadius(2, np.arange(3.0), np.arange(2.0))
    with pytest.raises(CodeError, match="all finite"):
        LloydMaxRadius(1, np.array([0.5, 0.7]), np.array([0.9]))
    with pytest.raises(CodeError, match="carry no norms"):
        NormRadius().decode(StoredRadii(), torch.float32)
