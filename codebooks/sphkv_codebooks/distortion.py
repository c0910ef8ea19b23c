"""Distortion in closed form, and the deterministic error bound.

With G = prod_l E cos(psi_l - psihat_l), the mean cosine between a block and its decode, and radii
normalised to E rho^2 = 1:

    unit gain                 D = 1 + E rhohat^2 - 2 E[rho rhohat] G     (exact radii: 2 (1 - G))
    optimal constant gain     D = 1 - G^2
    isotropic query           RMS relative logit error sqrt(D)

G is exact because angles of different levels are independent for Gaussian input and <u, uhat> obeys
C_l = cos psi cos psihat C_left + sin psi sin psihat C_right, whose halves have the same mean.

Bound, for every vector: with Delta_l <= pi/2 the largest distance of an angle from its centroid,

    ||k - khat|| <= ||r - rhat|| + ||r|| sqrt(2 (1 - prod_l cos Delta_l)).

(Ours; derived in THEORY.md.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sphkv_codebooks.codebook import Codebook
from sphkv_codebooks.density import AngleDensity, analytic_density, gauss_nodes
from sphkv_codebooks.radius import LloydMaxRadius

if TYPE_CHECKING:
    from sphkv_codebooks.encoded import EncodedVectors
    from sphkv_codebooks.spherical_code import SphericalCode


def unit_gain_distortion(self_gain: float) -> float:
    """D of exact radii and unit gain: 2 (1 - G)."""
    return 2.0 * (1.0 - self_gain)


def optimal_gain_distortion(self_gain: float) -> float:
    """D of exact radii and the best constant gain G: 1 - G^2."""
    return 1.0 - self_gain**2


def quantised_radius_distortion(self_gain: float, mean_square: float, correlation: float) -> float:
    """D = 1 + E rhohat^2 - 2 E[rho rhohat] G."""
    return 1.0 + mean_square - 2.0 * correlation * self_gain


def relative_logit_error(distortion: float) -> float:
    """RMS of (q.k - q.khat) sqrt(head_dim) / (||q|| ||k||) for an isotropic query: sqrt(D)."""
    return float(np.sqrt(distortion))


def level_gains(code: SphericalCode) -> tuple[float, ...]:
    """E cos(psi - psihat) of each level, for isotropic input."""
    return tuple(book.self_gain(analytic_density(book.level)) for book in code.codebooks)


@dataclass(frozen=True)
class CosineMoments:
    """First two moments of C = <u, uhat>, the cosine between a block and its decode."""

    mean: float
    mean_square: float

    @property
    def variance(self) -> float:
        return self.mean_square - self.mean**2


def cosine_moments(codebooks: tuple[Codebook, ...]) -> CosineMoments:
    """Moments of the block cosine for isotropic input, level by level.

    With a = cos psi cos psihat and b = sin psi sin psihat: E C_l = E[a + b] E C_(l-1) and
    E C_l^2 = E[a^2 + b^2] E C_(l-1)^2 + 2 E[a b] (E C_(l-1))^2.
    """
    mean, mean_square = 1.0, 1.0
    for book in codebooks:
        squares, product = _level_second_moments(book, analytic_density(book.level))
        mean_square = squares * mean_square + 2.0 * product * mean**2
        mean *= book.self_gain(analytic_density(book.level))
    return CosineMoments(mean, mean_square)


def _level_second_moments(book: Codebook, density: AngleDensity) -> tuple[float, float]:
    """(E[a^2 + b^2], E[a b])."""
    nodes, weights = gauss_nodes(*book.cell_edges())
    mass = weights * density.pdf(nodes)
    centre = book.centroids[:, None]
    a, b = np.cos(nodes) * np.cos(centre), np.sin(nodes) * np.sin(centre)
    return float((mass * (a**2 + b**2)).sum()), float((mass * a * b).sum())


def predicted_distortion(code: SphericalCode) -> float:
    """D of `code` for isotropic input with its gain.

    Exact for gain "none", and for least squares with one stored radius per block. A gain folded
    into a norm, and the unbiased gain, use the second-order expansion about the mean cosine.
    """
    moments = cosine_moments(code.codebooks)
    radius = code.radius_coding.moments(code.block_dim, code.head_dim)
    gain = moments.mean
    if code.gain == "none":
        return quantised_radius_distortion(gain, radius.mean_square, radius.correlation)
    if isinstance(code.radius_coding, LloydMaxRadius):
        # The norm corrects the common part of the radius errors: of the error vector e over the
        # blocks, the component along rhohat. And the cosines of a vector's blocks average with
        # weights r_j^2 / ||x||^2, whose squares sum to (block_dim + 2) / (head_dim + 2) on average.
        kept = radius.correlation**2 / radius.mean_square + radius.aligned_error / code.n_radii
        spread = moments.variance * (code.block_dim + 2) / (code.head_dim + 2)
        if code.gain == "least_squares":
            return 1.0 - gain**2 * kept - spread
        return (1.0 + 3.0 * spread / gain**2) / (gain**2 * kept) - 1.0
    # One stored radius t per block: t = s = <x, u> or r^2 / s, then rounded with relative error.
    rounding = radius.mean_square - 1.0
    if code.gain == "least_squares":
        return 1.0 - moments.mean_square * (1.0 - rounding)
    inverse_square = (1.0 + 3.0 * moments.variance / gain**2) / gain**2
    return inverse_square * (1.0 + rounding) - 1.0


@dataclass(frozen=True)
class DistortionShares:
    """Additive parts of D at unit gain; they sum to it exactly.

    levels[l-1] = 2 (G_(l-1) - G_l) with G_l = the product over levels 1..l; radius: the rest, what
    quantised radii add.
    """

    levels: tuple[float, ...]
    radius: float

    @property
    def total(self) -> float:
        return sum(self.levels) + self.radius


def distortion_shares(code: SphericalCode) -> DistortionShares:
    """Each level's part of the unit-gain D for isotropic input."""
    cumulative = np.concatenate([[1.0], np.cumprod(level_gains(code))])
    levels = tuple(float(part) for part in 2.0 * (cumulative[:-1] - cumulative[1:]))
    radius = code.radius_coding.moments(code.block_dim, code.head_dim)
    total = quantised_radius_distortion(
        float(cumulative[-1]), radius.mean_square, radius.correlation
    )
    return DistortionShares(levels, total - sum(levels))


def worst_block_cosine(codebooks: tuple[Codebook, ...]) -> float:
    """The smallest <u, uhat> any unit block can have: prod_l cos Delta_l.

    By induction C_l >= c (cos psi cos psihat + sin psi sin psihat) = c cos(psi - psihat) where
    C_(l-1) >= c >= 0. Only level 1 can have Delta > pi/2 (fewer than two cells); then c < 0 and the
    upper levels, whose factor is at most 1, cannot make it worse.
    """
    worst = float(np.cos(min(codebooks[0].max_cell_radius, np.pi)))
    if worst < 0:
        return worst
    for book in codebooks[1:]:
        worst *= float(np.cos(book.max_cell_radius))
    return worst


def direction_bound(codebooks: tuple[Codebook, ...]) -> float:
    """sup ||u - uhat|| over unit blocks u: sqrt(2 (1 - prod_l cos Delta_l)); attained."""
    return float(np.sqrt(2.0 * (1.0 - worst_block_cosine(codebooks))))


def error_bound(code: SphericalCode, radii: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """The bound on ||x - xhat||, shape (...), from true and stored radii (..., n_radii).

    Times ||q|| it bounds |q.x - q.xhat|. It holds for every gain: a folded gain only moves
    `stored`.
    """
    difference: torch.Tensor = torch.linalg.vector_norm(radii - stored, dim=-1)
    norms: torch.Tensor = torch.linalg.vector_norm(radii, dim=-1)
    return difference + norms * direction_bound(code.codebooks)


def vector_error_bound(
    code: SphericalCode, x: torch.Tensor, encoded: EncodedVectors
) -> torch.Tensor:
    """error_bound for vectors x (..., head_dim) and their codes, in float64."""
    blocks = _block_radii(x.to(torch.float64), code)
    return error_bound(code, blocks, code.decode_radii(encoded, torch.float64))


def _block_radii(x: torch.Tensor, code: SphericalCode) -> torch.Tensor:
    if code.pairing == "rope":
        half = x.shape[-1] // 2
        x = torch.stack((x[..., :half], x[..., half:]), dim=-1).flatten(-2)
    blocks = x.reshape(*x.shape[:-1], code.n_radii, code.block_dim)
    norms: torch.Tensor = torch.linalg.vector_norm(blocks, dim=-1)
    return norms
