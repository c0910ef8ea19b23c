"""A code that is used wrongly must be visibly worse, so that a report shows the mistake.

Every control breaks one thing and is measured as any code is, D = E||x - x^||^2 / ||x||^2, on
vectors as keys are: a few coordinates far larger than the rest.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from sphkv_codebooks.codebook import Codebook
from sphkv_codebooks.encoded import EncodedVectors
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode

HEAD_DIM = 64
CODE = SphericalCode.analytic("right", HEAD_DIM, (4, 2, 2, 2), "lloyd_max:2")
ROTATION = Rotation("haar", HEAD_DIM, 7)
N_VECTORS = 4000


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    rng = np.random.default_rng(5)
    scale = np.where(np.isin(np.arange(HEAD_DIM), (3, 17, 40, 62)), 30.0, 1.0)
    return torch.from_numpy(rng.standard_normal((N_VECTORS, HEAD_DIM)) * scale).float()


Transform = Callable[[torch.Tensor], torch.Tensor]


def distortion(
    x: torch.Tensor,
    there: Transform = ROTATION.apply,
    back: Transform = ROTATION.apply_inverse,
    writer: SphericalCode = CODE,
    reader: SphericalCode = CODE,
    on_the_way: Callable[[EncodedVectors], EncodedVectors] = lambda encoded: encoded,
) -> float:
    """D of vectors taken into the frame, written by one code and read by another."""
    read = back(reader.decode(on_the_way(writer.encode(there(x)))))
    return float((read - x).square().sum() / x.square().sum())


def of_angles(level: int, change: Transform) -> Callable[[EncodedVectors], EncodedVectors]:
    """Change the stored angle codes of one level."""

    def changed(encoded: EncodedVectors) -> EncodedVectors:
        codes = list(encoded.angle_codes)
        codes[level - 1] = change(codes[level - 1])
        return replace(encoded, angle_codes=tuple(codes))

    return changed


def test_the_right_use_has_the_predicted_distortion(x: torch.Tensor) -> None:
    # Four coordinates under one rotation: near the mean over rotations, not at it.
    assert distortion(x) == pytest.approx(CODE.distortion(), rel=0.15)


def test_another_rotation_on_the_way_back_returns_another_vector(x: torch.Tensor) -> None:
    wrong = Rotation("haar", HEAD_DIM, 8)
    # Independent vectors of equal length: E||x^ - x||^2 = 2 ||x||^2.
    assert distortion(x, back=wrong.apply_inverse) > 1.0


def test_a_gaussian_matrix_is_not_orthogonal(x: torch.Tensor) -> None:
    rng = np.random.default_rng(1)
    entries = rng.standard_normal((HEAD_DIM, HEAD_DIM)) / HEAD_DIM**0.5
    matrix = torch.from_numpy(entries).float()
    # S^T S of a square one has a relative error of about 1 per vector: read by its transpose it
    # loses more than any code here does.
    assert distortion(x, lambda v: v @ matrix.T, lambda v: v @ matrix) > 20 * distortion(x)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_a_shuffled_book_is_visibly_worse(x: torch.Tensor, level: int) -> None:
    n_cells = CODE.codebooks[level - 1].n_cells
    order = torch.from_numpy(np.random.default_rng(level).permutation(n_cells)).to(torch.uint8)
    assert (order != torch.arange(n_cells)).any()
    shuffled = of_angles(level, lambda codes: order[codes.long()])
    assert distortion(x, on_the_way=shuffled) > 2 * distortion(x)


def test_no_rotation_is_visibly_worse(x: torch.Tensor) -> None:
    assert distortion(x, there=lambda v: v, back=lambda v: v) > 1.5 * distortion(x)


def test_swapped_levels_are_visibly_worse(x: torch.Tensor) -> None:
    books = list(CODE.codebooks)
    low, high = books[1], books[3]
    books[1] = Codebook(2, high.centroids, high.thresholds, False)
    books[3] = Codebook(4, low.centroids, low.thresholds, False)
    swapped = CODE.with_codebooks("swapped", books)
    # Both sides by the same mistake, and the reader alone.
    assert distortion(x, writer=swapped, reader=swapped) > 1.2 * distortion(x)
    assert distortion(x, reader=swapped) > 1.2 * distortion(x)


def test_one_level_1_bit_too_few_is_visibly_worse(x: torch.Tensor) -> None:
    coarse = SphericalCode.analytic("coarse", HEAD_DIM, (3, 2, 2, 2), "lloyd_max:2")
    found = distortion(x, writer=coarse, reader=coarse)
    assert found > 1.8 * distortion(x)
    assert found == pytest.approx(coarse.distortion(), rel=0.15)
