"""The recursive polar transform and the angle-domain dot product.

    r^0 = x,   psi^l_j = atan2(r^(l-1)_(2j+1), r^(l-1)_(2j)),   r^l_j = hypot(r^(l-1)_(2j),
    r^(l-1)_(2j+1))

(0-based j; PolarQuant, arXiv 2502.02617, section 3, with atan2 where the paper prints arctan: only
atan2 gives level 1 its circle.) Angle-Domain Attention (Spherical KV, arXiv 2605.18856) runs the
recursion on the query instead: t^0 = q, t^l_j = cos(psi^l_j) t^(l-1)_(2j) + sin(psi^l_j)
t^(l-1)_(2j+1), and then q . k = sum_j r^L_j t^L_j, exactly.

`pairing` says which coordinates meet at level 1: "adjacent" (2j, 2j+1) or "rope" (j, j +
head_dim/2). From level 2 on neighbours always meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from sphkv_codebooks.density import TWO_PI
from sphkv_codebooks.errors import CodeError

Pairing = Literal["adjacent", "rope"]


def check_head_dim(head_dim: int) -> None:
    if head_dim < 2 or head_dim & (head_dim - 1):
        raise CodeError(f"head_dim must be a power of two, 2 or more; got {head_dim}")


def check_depth(head_dim: int, depth: int) -> None:
    """Refuse a depth outside 1..log2(head_dim)."""
    check_head_dim(head_dim)
    deepest = head_dim.bit_length() - 1
    if not 1 <= depth <= deepest:
        raise CodeError(
            f"depth {depth} is out of range: head_dim {head_dim} allows 1 to {deepest} levels"
        )


def check_pairing(pairing: str) -> None:
    if pairing not in get_args(Pairing):
        raise CodeError(f"pairing must be 'adjacent' or 'rope', got {pairing!r}")


@dataclass(frozen=True)
class PolarVectors:
    """angles[l-1]: (..., head_dim / 2^l) radians; radii: (..., head_dim / 2^depth)."""

    angles: tuple[torch.Tensor, ...]
    radii: torch.Tensor


def split_pairs(x: torch.Tensor, pairing: Pairing) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second member of every level-1 pair: two views (..., head_dim / 2)."""
    if pairing == "adjacent":
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def join_pairs(first: torch.Tensor, second: torch.Tensor, pairing: Pairing) -> torch.Tensor:
    """The inverse of split_pairs: (..., head_dim)."""
    if pairing == "adjacent":
        return torch.stack((first, second), dim=-1).flatten(-2)
    return torch.cat((first, second), dim=-1)


def to_polar(x: torch.Tensor, depth: int, pairing: Pairing = "adjacent") -> PolarVectors:
    """Angles and radii of x (..., head_dim), in x's dtype.

    Level 1 lies in [0, 2 pi), the others in [0, pi/2]. A zero pair has angle 0.
    """
    check_depth(x.shape[-1], depth)
    check_pairing(pairing)
    angles = []
    radii = x
    for level in range(1, depth + 1):
        first, second = split_pairs(radii, pairing if level == 1 else "adjacent")
        angle = torch.atan2(second, first)
        if level == 1:
            angle = torch.where(angle < 0, angle + TWO_PI, angle)
            # A tiny negative angle rounds up to 2 pi, which is 0.
            angle = torch.where(angle >= TWO_PI, torch.zeros_like(angle), angle)
        angles.append(angle)
        radii = torch.hypot(first, second)
    return PolarVectors(tuple(angles), radii)


def from_polar(polar: PolarVectors, pairing: Pairing = "adjacent") -> torch.Tensor:
    """The vectors (..., head_dim) of their angles and radii."""
    check_pairing(pairing)
    x = polar.radii
    for level in range(len(polar.angles), 0, -1):
        angle = polar.angles[level - 1]
        x = join_pairs(
            x * torch.cos(angle), x * torch.sin(angle), pairing if level == 1 else "adjacent"
        )
    return x


def angle_domain_dot(
    q: torch.Tensor,
    angles: tuple[torch.Tensor, ...],
    radii: torch.Tensor,
    pairing: Pairing = "adjacent",
) -> torch.Tensor:
    """q . k for q (..., head_dim) and k given by angles and radii; leading axes broadcast."""
    return recursive_dot(
        q, tuple((torch.cos(angle), torch.sin(angle)) for angle in angles), radii, pairing
    )


def recursive_dot(
    q: torch.Tensor,
    cos_sin: tuple[tuple[torch.Tensor, torch.Tensor], ...],
    radii: torch.Tensor,
    pairing: Pairing,
) -> torch.Tensor:
    """As angle_domain_dot, for cosines and sines read from tables."""
    t = q
    for level, (cosine, sine) in enumerate(cos_sin, start=1):
        first, second = split_pairs(t, pairing if level == 1 else "adjacent")
        t = cosine * first + sine * second
    return (radii * t).sum(dim=-1)
