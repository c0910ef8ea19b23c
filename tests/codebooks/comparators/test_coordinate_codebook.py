"""Books of one coordinate against TurboQuant's table and against scipy's quadrature."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special

from sphkv_codebooks.comparators.coordinate_codebook import GAUSSIAN, coordinate_codebook
from sphkv_codebooks.errors import CodeError

# (head_dim, bits, D, half a unit of the last printed digit)
TABLE = [
    (GAUSSIAN, 1, 0.36338, 5e-6),
    (GAUSSIAN, 2, 0.117482, 5e-7),
    (GAUSSIAN, 3, 0.034548, 5e-7),
    (GAUSSIAN, 4, 0.009501, 5e-7),
    (GAUSSIAN, 5, 0.002505, 5e-7),
    (128, 1, 0.36089, 5e-6),
    (128, 2, 0.11600, 5e-6),
    (128, 3, 0.03397, 5e-6),
    (128, 4, 0.009315, 5e-7),
]


def coordinate_pdf(head_dim: int, u: float) -> float:
    """The density of u = sqrt(d) t, written down a second time."""
    if head_dim == GAUSSIAN:
        return math.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
    t = u / math.sqrt(head_dim)
    if abs(t) >= 1:
        return 0.0
    log_norm = special.betaln(0.5, 0.5 * (head_dim - 1)) + 0.5 * math.log(head_dim)
    return math.exp(0.5 * (head_dim - 3) * math.log1p(-t * t) - log_norm)


@pytest.mark.parametrize(("head_dim", "bits", "distortion", "tolerance"), TABLE)
def test_distortion_is_the_published_one(
    head_dim: int, bits: int, distortion: float, tolerance: float
) -> None:
    book = coordinate_codebook(head_dim, bits)
    assert book.distortion == pytest.approx(distortion, abs=tolerance)


def test_one_bit_of_the_normal_is_closed_form() -> None:
    book = coordinate_codebook(GAUSSIAN, 1)
    assert book.centroids == pytest.approx([-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)])
    assert book.distortion == pytest.approx(1 - 2 / math.pi, rel=1e-14)


@pytest.mark.parametrize("head_dim", [GAUSSIAN, 4, 8, 64, 128, 256])
@pytest.mark.parametrize("bits", [1, 3, 5])
def test_centroids_are_means_of_their_cells_and_thresholds_halfway(
    head_dim: int, bits: int
) -> None:
    book = coordinate_codebook(head_dim, bits)
    end = 12.0 if head_dim == GAUSSIAN else math.sqrt(head_dim)
    edges = np.concatenate([[-end], book.thresholds, [end]])
    distortion = 0.0
    for cell, centroid in enumerate(book.centroids):
        lower, upper = edges[cell], edges[cell + 1]
        mass, first, error = (
            integrate.quad(
                lambda u, p=power, c=centre: (u - c) ** p * coordinate_pdf(head_dim, u),
                lower,
                upper,
                epsabs=1e-13,
                limit=200,
            )[0]
            for power, centre in ((0, 0.0), (1, 0.0), (2, centroid))
        )
        # quad stops at 1e-13 absolute; the outermost cell of 5 bits holds 1e-3 of the mass.
        assert first / mass == pytest.approx(centroid, abs=1e-8)
        distortion += error
    assert book.thresholds == pytest.approx(
        0.5 * (book.centroids[1:] + book.centroids[:-1]), abs=1e-9
    )
    assert book.distortion == pytest.approx(distortion, rel=1e-8)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_the_sphere_tends_to_the_normal_from_below(bits: int) -> None:
    limit = coordinate_codebook(GAUSSIAN, bits).distortion
    gaps = [limit - coordinate_codebook(d, bits).distortion for d in (16, 64, 256, 1024)]
    assert all(g > 0 for g in gaps)
    # The density differs from the normal by O(1/d): four times the dimension, a quarter of the gap.
    for wide, narrow in itertools.pairwise(gaps):
        assert narrow == pytest.approx(wide / 4, rel=0.15)


@pytest.mark.parametrize("head_dim", [GAUSSIAN, 4, 64, 128])
def test_more_bits_never_hurt(head_dim: int) -> None:
    distortions = [coordinate_codebook(head_dim, bits).distortion for bits in range(9)]
    assert distortions[0] == 1.0
    assert all(more < less / 2 for less, more in itertools.pairwise(distortions))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([GAUSSIAN, 64, 128]))
def test_every_value_goes_to_its_nearest_centroid(seed: int, bits: int, head_dim: int) -> None:
    book = coordinate_codebook(head_dim, bits)
    u = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, 17)) * 2)
    distances = (u[..., None] - torch.tensor(book.centroids)).abs()
    nearest = torch.tensor(book.centroids)[distances.argmin(-1)]
    assert torch.equal(book.quantize(u), nearest)


@pytest.mark.parametrize(("head_dim", "bits"), [(3, 2), (-1, 2), (64, 9), (64, -1)])
def test_what_cannot_be_designed_is_refused(head_dim: int, bits: int) -> None:
    with pytest.raises(CodeError):
        coordinate_codebook(head_dim, bits)
