"""The polar transform: golden values, inversion, and the angle-domain identity."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sphkv_codebooks.density import TWO_PI
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.polar import Pairing, angle_domain_dot, from_polar, to_polar

PAIRINGS: tuple[Pairing, ...] = ("adjacent", "rope")


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def test_golden_vector() -> None:
    """(1, sqrt 3, 2, 0): level-1 angles pi/3 and 0, both radii 2, level-2 angle pi/4."""
    x = torch.tensor([1.0, math.sqrt(3.0), 2.0, 0.0], dtype=torch.float64)
    polar = to_polar(x, 2)
    torch.testing.assert_close(
        polar.angles[0], torch.tensor([math.pi / 3, 0.0], dtype=torch.float64)
    )
    torch.testing.assert_close(polar.angles[1], torch.tensor([math.pi / 4], dtype=torch.float64))
    torch.testing.assert_close(polar.radii, torch.tensor([math.sqrt(8.0)], dtype=torch.float64))


def test_rope_pairing_meets_coordinate_j_and_j_plus_half() -> None:
    x = torch.tensor([1.0, 2.0, math.sqrt(3.0), 0.0], dtype=torch.float64)
    polar = to_polar(x, 2, "rope")
    torch.testing.assert_close(
        polar.angles[0], torch.tensor([math.pi / 3, 0.0], dtype=torch.float64)
    )


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 8), st.sampled_from(PAIRINGS))
def test_dot_equals_dense(seed: int, log_dim: int, depth: int, pairing: Pairing) -> None:
    """q . k from the recursion, to 1e-12 of ||q|| ||k|| in float64, at every depth."""
    head_dim = 1 << log_dim
    depth = min(depth, log_dim)
    q, k = gaussian(seed, 5, head_dim), gaussian(seed + 1, 5, head_dim)
    polar = to_polar(k, depth, pairing)
    dot = angle_domain_dot(q, polar.angles, polar.radii, pairing)
    scale = q.norm(dim=-1) * k.norm(dim=-1)
    assert ((dot - (q * k).sum(-1)).abs() <= 1e-12 * scale).all()
    assert ((from_polar(polar, pairing) - k).abs() <= 1e-12 * k.norm(dim=-1)[:, None]).all()


@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from(PAIRINGS))
def test_dot_is_exact_for_any_angles(seed: int, depth: int, pairing: Pairing) -> None:
    """Quantised angles too: the recursion is the dot product with the decoded vector."""
    generator = torch.Generator().manual_seed(seed)
    angles = tuple(
        torch.rand(3, 64 >> level, dtype=torch.float64, generator=generator)
        * (TWO_PI if level == 1 else math.pi / 2)
        for level in range(1, depth + 1)
    )
    radii = torch.rand(3, 64 >> depth, dtype=torch.float64, generator=generator)
    q = gaussian(seed, 3, 64)
    from sphkv_codebooks.polar import PolarVectors

    k = from_polar(PolarVectors(angles, radii), pairing)
    scale = q.norm(dim=-1) * k.norm(dim=-1)
    dot = angle_domain_dot(q, angles, radii, pairing)
    assert ((dot - (q * k).sum(-1)).abs() <= 1e-12 * scale).all()


def test_norm_is_preserved_and_angles_lie_in_range() -> None:
    x = gaussian(3, 2, 3, 128)
    for depth in range(1, 8):
        polar = to_polar(x, depth)
        torch.testing.assert_close(polar.radii.norm(dim=-1), x.norm(dim=-1))
        assert tuple(a.shape for a in polar.angles) == tuple(
            (2, 3, 128 >> level) for level in range(1, depth + 1)
        )
        assert ((polar.angles[0] >= 0) & (polar.angles[0] < TWO_PI)).all()
        for angle in polar.angles[1:]:
            assert ((angle >= 0) & (angle <= math.pi / 2)).all()


def test_tiny_negative_angle_is_zero_not_two_pi() -> None:
    """In float32, -1e-9 + 2 pi rounds to 2 pi, outside [0, 2 pi)."""
    polar = to_polar(torch.tensor([1.0, -1e-9]), 1)
    assert 0.0 <= float(polar.angles[0][0]) < TWO_PI


def test_zero_vector_has_zero_angles() -> None:
    polar = to_polar(torch.zeros(4, 16, dtype=torch.float64), 4)
    assert all((angle == 0).all() for angle in polar.angles)
    assert (polar.radii == 0).all()
    assert (from_polar(polar) == 0).all()


@pytest.mark.parametrize("head_dim", [0, 1, 3, 48, 96, 130])
def test_head_dim_must_be_a_power_of_two(head_dim: int) -> None:
    with pytest.raises(CodeError, match=f"power of two.*{head_dim}"):
        to_polar(torch.zeros(2, head_dim), 1)


@pytest.mark.parametrize("depth", [-1, 0, 7, 100])
def test_depth_out_of_range_is_refused(depth: int) -> None:
    with pytest.raises(CodeError, match=f"depth {depth} is out of range.*1 to 6"):
        to_polar(torch.zeros(2, 64), depth)


def test_unknown_pairing_is_refused() -> None:
    with pytest.raises(CodeError, match="'adjacent' or 'rope', got 'diagonal'"):
        to_polar(torch.zeros(2, 64), 1, "diagonal")  # type: ignore[arg-type]
