"""Rotations are orthogonal, reproducible and the transform they claim to be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.rotation import Rotation, RotationKind

KINDS: tuple[RotationKind, ...] = ("haar", "hadamard", "none")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [2, 64, 128, 256])
def test_matrix_is_orthogonal(kind: RotationKind, head_dim: int) -> None:
    matrix = Rotation(kind, head_dim, seed=3).matrix()
    assert matrix.dtype == np.float64
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(head_dim), atol=1e-12)


@given(st.sampled_from(KINDS), st.integers(1, 8), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_apply_is_the_matrix_and_keeps_dot_products(
    kind: RotationKind, log_dim: int, seed: int
) -> None:
    head_dim = 1 << log_dim
    rotation = Rotation(kind, head_dim, seed)
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 3, 5, head_dim, dtype=torch.float64, generator=generator)
    matrix = torch.from_numpy(rotation.matrix())
    torch.testing.assert_close(rotation.apply(x), x @ matrix.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(rotation.apply_inverse(rotation.apply(x)), x, atol=1e-12, rtol=0)
    turned = (rotation.apply(x) * rotation.apply(y)).sum(-1)
    torch.testing.assert_close(turned, (x * y).sum(-1), atol=1e-11, rtol=0)


def test_fast_hadamard_is_scipys_matrix_bit_for_bit_of_powers_of_two() -> None:
    """head_dim 64 scales by exactly 1/8: integers come out exactly."""
    rotation = Rotation("hadamard", 64, seed=9)
    x = torch.randint(-50, 50, (7, 64), generator=torch.Generator().manual_seed(1)).double()
    expected = (x.numpy() * rotation.signs) @ hadamard(64).T / 8
    assert (rotation.apply(x).numpy() == expected).all()


def test_gaussian_rows_scale_energy_and_orthogonal_rows_do_not() -> None:
    """E ||S x||^2 = m ||x||^2 for m Gaussian rows: a Gaussian S is no rotation and no projection
    that S^T undoes. With S / sqrt(d), x - S^T S x / d has E = (1 + 1/d) ||x||^2 (the trap), where
    an orthogonal S has 0."""
    head_dim, n_trials = 128, 400
    rng = np.random.default_rng(5)
    x = rng.standard_normal(head_dim)
    energy, loss = [], []
    for _ in range(n_trials):
        gaussian = rng.standard_normal((head_dim, head_dim))
        energy.append(np.sum((gaussian @ x) ** 2))
        loss.append(np.sum((x - gaussian.T @ (gaussian @ x) / head_dim) ** 2))
    # ||S x||^2 / ||x||^2 is chi-square with m degrees of freedom: relative deviation sqrt(2 / m)
    # per trial, 4 standard errors allowed.
    tolerance = 4 * math.sqrt(2 / head_dim / n_trials)
    assert np.mean(energy) == pytest.approx(head_dim * np.sum(x**2), rel=tolerance)
    # A trial deviates by about 20 %.
    assert np.mean(loss) / np.sum(x**2) == pytest.approx(1 + 1 / head_dim, rel=4 * 0.2 / 20)
    turned = Rotation("haar", head_dim).matrix() @ x
    assert np.sum(turned**2) == pytest.approx(np.sum(x**2), rel=1e-12)


def test_haar_rotation_makes_an_axis_look_gaussian() -> None:
    """What a rotation is for: the images of one axis over seeds spread over the sphere."""
    images = np.stack([Rotation("haar", 64, seed).matrix()[:, 0] for seed in range(60)])
    coordinates = images.reshape(-1) * 8.0
    assert np.mean(coordinates) == pytest.approx(0.0, abs=4 / math.sqrt(coordinates.size))
    assert np.mean(coordinates**4) == pytest.approx(3 * 64 / 66, rel=0.2)


@pytest.mark.parametrize("kind", ["haar", "hadamard"])
def test_digest_names_the_matrix(kind: RotationKind) -> None:
    rotation = Rotation(kind, 64, seed=1)
    assert rotation.digest == Rotation(kind, 64, seed=1).digest
    others = {Rotation(kind, 64, seed=2).digest, Rotation("none", 64).digest}
    assert len(others | {rotation.digest}) == 3
    # Last-bit differences between LAPACK builds do not change it.
    nudged = rotation.matrix() * (1 + 1e-15)
    assert Rotation(kind, 64, seed=1, stored_matrix=nudged).digest == rotation.digest


def test_stored_matrix_is_used_and_checked() -> None:
    rotation = Rotation("haar", 16, seed=1)
    nudged = rotation.matrix() * (1 + 1e-12)
    again = Rotation("haar", 16, seed=1, stored_matrix=nudged)
    assert (again.matrix() == nudged).all()
    assert again == rotation
    with pytest.raises(CodeError, match="not the one of seed 1"):
        Rotation("haar", 16, seed=1, stored_matrix=Rotation("haar", 16, seed=2).matrix())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fourier", 64, 0), "haar, hadamard or none, got 'fourier'"),
        (("haar", 96, 0), "power of two.*96"),
        (("haar", 64, -1), "seed must be >= 0"),
    ],
)
def test_bad_rotations_are_refused(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(CodeError, match=message):
        Rotation(*arguments)  # type: ignore[arg-type]


def test_rotation_of_another_head_dim_is_refused() -> None:
    with pytest.raises(CodeError, match="head_dim 64"):
        Rotation("hadamard", 64).apply(torch.zeros(3, 128))
