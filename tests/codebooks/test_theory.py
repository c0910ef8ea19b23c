"""What THEORY.md says about real keys and about rotation, as experiments that could refute it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from sphkv_codebooks.density import analytic_density
from sphkv_codebooks.distortion import vector_error_bound
from sphkv_codebooks.polar import to_polar
from sphkv_codebooks.radius import LloydMaxRadius
from sphkv_codebooks.rotation import Rotation, RotationKind
from sphkv_codebooks.spherical_code import SphericalCode

HEAD_DIM = 64
N_SEEDS = 500
PAPER = SphericalCode.analytic("paper", HEAD_DIM)


def relative_error(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """||x - xhat||^2 / ||x||^2 of each vector, coded in the rotated frame."""
    framed = rotation.apply(x)
    error = framed - PAPER.decode(PAPER.encode(framed))
    return error.square().sum(-1) / framed.square().sum(-1)


def mean_over_rotations(x: torch.Tensor, kind: RotationKind, n_seeds: int) -> float:
    framed = torch.stack([Rotation(kind, HEAD_DIM, seed).apply(x) for seed in range(n_seeds)])
    return float(relative_error(framed, Rotation("none", HEAD_DIM)).mean())


def fixed_vectors() -> dict[str, torch.Tensor]:
    axis = torch.zeros(HEAD_DIM)
    axis[3] = 1.0
    ramp = torch.arange(HEAD_DIM, dtype=torch.float32)
    return {"axis": axis, "constant": torch.ones(HEAD_DIM), "ramp": ramp}


@pytest.mark.parametrize("name", fixed_vectors())
def test_a_haar_rotation_gives_every_vector_the_gaussian_distortion(name: str) -> None:
    """E over S of the error of any fixed x is D: no assumption about the data is left."""
    mean = mean_over_rotations(fixed_vectors()[name], "haar", N_SEEDS)
    # The error of one rotation deviates by about 25 %: 4 standard errors.
    assert mean == pytest.approx(PAPER.distortion(), rel=4 * 0.25 / math.sqrt(N_SEEDS))


def test_without_rotation_the_distortion_depends_on_the_vector() -> None:
    unrotated = Rotation("none", HEAD_DIM)
    errors = [float(relative_error(x, unrotated)) for x in fixed_vectors().values()]
    assert max(errors) > 10 * PAPER.distortion()
    assert min(errors) > 1.5 * PAPER.distortion()


def test_a_hadamard_rotation_of_an_axis_is_its_hard_case() -> None:
    """All coordinates are +-1/sqrt(d): every angle is pi/4 modulo pi/2, on a threshold of every
    level, for every choice of signs. Its error is 2 (1 - prod cos(distance)) = 2.5 D, always."""
    books = PAPER.codebooks
    distances = [math.pi / 16, *(np.abs(b.centroids - math.pi / 4).min() for b in books[1:])]
    expected = 2 * (1 - np.prod(np.cos(distances)))
    assert expected / PAPER.distortion() == pytest.approx(2.5, abs=0.05)
    axis = fixed_vectors()["axis"]
    for seed in range(5):
        error = float(relative_error(axis, Rotation("hadamard", HEAD_DIM, seed)))
        assert error == pytest.approx(expected, rel=1e-3)
    # Vectors whose energy lies in many coordinates meet the Gaussian value.
    mean = mean_over_rotations(fixed_vectors()["ramp"], "hadamard", N_SEEDS)
    assert mean == pytest.approx(PAPER.distortion(), rel=4 * 0.25 / math.sqrt(N_SEEDS))


def keys_with_structure(n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys as models have them: a large constant bias, and a few coordinates far wider."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.ones(HEAD_DIM)
    spread[[5, 6, 40]] = 8.0
    bias = torch.zeros(HEAD_DIM)
    bias[[10, 33]] = 40.0
    return bias, torch.randn(n_tokens, HEAD_DIM, generator=generator) * spread


def ks_distance(x: torch.Tensor, level: int) -> float:
    """The largest Kolmogorov-Smirnov distance of any angle of a level to the analytic density."""
    angles = to_polar(x.double(), level).angles[-1].numpy()
    cdf = analytic_density(level).cdf
    return max(float(stats.kstest(column, cdf).statistic) for column in angles.T)


def test_structure_bends_the_angle_densities_and_rotation_half_unbends_them() -> None:
    """One fixed S flattens the covariance's diagonal, not the covariance: single angles keep a KS
    distance of .1 to .3. The distortion, an average over all angles, is back at D all the same."""
    _, keys = keys_with_structure(4000)
    rotation = Rotation("haar", HEAD_DIM, 1)
    for level in (2, 3, 4):
        turned = ks_distance(rotation.apply(keys), level)
        assert 0.1 < turned < 0.6 * ks_distance(keys, level)
    assert float(relative_error(keys, Rotation("none", HEAD_DIM)).mean()) > 4 * PAPER.distortion()
    turned_error = float(relative_error(keys, rotation).mean())
    assert turned_error == pytest.approx(PAPER.distortion(), rel=0.05)


def test_a_bias_survives_rotation_and_centring_removes_it() -> None:
    """One S for all tokens turns the bias into another constant: angles stay concentrated."""
    bias, keys = keys_with_structure(4000)
    rotation = Rotation("haar", HEAD_DIM, 1)
    biased = ks_distance(rotation.apply(keys + bias), 1)
    centred = ks_distance(rotation.apply(keys), 1)
    assert biased > 4 * centred
    # The noise is relative to the norm, so an uncentred bias is paid for in the spread's terms.
    x = keys + bias
    noise = relative_error(x, rotation) * x.square().sum(-1)
    centred_noise = relative_error(keys, rotation) * keys.square().sum(-1)
    expected = (x.square().sum(-1).mean() / keys.square().sum(-1).mean()).item()
    assert expected > 9
    assert (noise.mean() / centred_noise.mean()).item() == pytest.approx(expected, rel=0.3)


def test_logit_noise_grows_with_the_norm_of_the_key() -> None:
    """eps = ||q|| ||k|| sqrt(D / d): ten times the radius, ten times the logit error."""
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 20_000, HEAD_DIM, generator=generator)
    for scale in (1.0, 10.0, 100.0):
        error = ((scale * k - PAPER.decode(PAPER.encode(scale * k))) * q).sum(-1)
        predicted = math.sqrt(PAPER.distortion() / HEAD_DIM) * q.norm(dim=-1) * scale
        predicted = predicted * k.norm(dim=-1)
        ratio = error.square().mean().sqrt() / predicted.square().mean().sqrt()
        assert float(ratio) == pytest.approx(1.0, abs=0.02)


def test_a_vector_of_one_block_is_what_relative_radii_cannot_hold() -> None:
    """All of the norm in one block of n: rho = sqrt(n) there and 0 elsewhere, far outside the book,
    so the block shrinks to the last centroid and the empty ones get the first. Rotated, the same
    vector is an ordinary one; and the bound covers both."""
    code = SphericalCode.analytic("r2", 128, (4, 2, 2, 2), "lloyd_max:2")
    coding = code.radius_coding
    assert isinstance(coding, LloydMaxRadius)
    x = torch.zeros(128)
    x[:16] = torch.randn(16, generator=torch.Generator().manual_seed(3))
    stored = code.decode_radii(code.encode(x), torch.float64) / x.double().norm()
    expected = coding.centroids[[3, 0, 0, 0, 0, 0, 0, 0]] / math.sqrt(8)
    np.testing.assert_allclose(stored.numpy(), expected, rtol=1e-3)
    error = float((x - code.decode(code.encode(x))).square().sum() / x.square().sum())
    assert error > 0.7
    assert error <= float(vector_error_bound(code, x, code.encode(x)) / x.norm()) ** 2
    framed = torch.stack([Rotation("haar", 128, seed).apply(x) for seed in range(300)])
    rotated = (framed - code.decode(code.encode(framed))).square().sum(-1) / x.square().sum()
    # One rotation deviates by about 20 %: 4 standard errors of 300.
    assert float(rotated.mean()) == pytest.approx(code.distortion(), rel=4 * 0.2 / math.sqrt(300))
