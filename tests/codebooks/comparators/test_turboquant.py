"""TurboQuant against its table, and against itself used wrongly."""

import math

import numpy as np
import pytest
import torch

from sphkv_codebooks.comparators.coordinate_codebook import GAUSSIAN, coordinate_codebook
from sphkv_codebooks.comparators.qjl import Qjl
from sphkv_codebooks.comparators.turboquant_mse import TurboQuantMse
from sphkv_codebooks.comparators.turboquant_prod import TurboQuantProd
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.rotation import Rotation

HEAD_DIM = 128


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def distortion(x: torch.Tensor, decoded: torch.Tensor) -> float:
    per_vector = (x - decoded).square().sum(-1) / x.square().sum(-1)
    return float(per_vector.mean())


@pytest.mark.parametrize(
    ("bits", "published"), [(1, 0.36089), (2, 0.11600), (3, 0.03397), (4, 0.009315)]
)
def test_measured_distortion_is_the_published_one(bits: int, published: float) -> None:
    x = gaussian(bits, 4000, HEAD_DIM) * 7
    # Another seed than the data's: Rotation and default_rng share their stream, and the Q of a
    # matrix turns that very matrix into a triangle.
    method = TurboQuantMse(bits, HEAD_DIM, Rotation("haar", HEAD_DIM, seed=100 + bits))
    # A vector's own distortion scatters by 5 to 17 %, so the mean of 4000 by 0.3 % at most.
    assert distortion(x, method.reconstruct(x)) == pytest.approx(published, rel=0.012)
    assert method.distortion == pytest.approx(published, rel=2e-4)


@pytest.mark.parametrize("kind", ["axis", "constant"])
def test_any_vector_has_the_same_distortion_under_random_rotations(kind: str) -> None:
    x = torch.zeros(1, 64, dtype=torch.float64)
    x[0, 5] = 3.0
    if kind == "constant":
        x[:] = 0.25
    errors = [
        distortion(x, TurboQuantMse(2, 64, Rotation("haar", 64, seed)).reconstruct(x))
        for seed in range(300)
    ]
    # 300 draws, each scattering by about 18 %: 4 standard errors.
    predicted = coordinate_codebook(64, 2).distortion
    assert np.mean(errors) == pytest.approx(predicted, rel=4 * 0.18 / math.sqrt(300))


def test_an_axis_vector_without_rotation_is_visibly_worse() -> None:
    x = torch.zeros(1, 64, dtype=torch.float64)
    x[0, 5] = 3.0
    assert distortion(x, TurboQuantMse(3, 64).reconstruct(x)) > 0.5


@pytest.mark.parametrize(
    ("bits", "published", "tolerance"),
    [(1, 1.571, 5e-4), (2, 0.571, 5e-4), (3, 0.1845, 5e-5), (4, 0.0543, 5e-5)],
)
def test_prod_error_in_the_limit_is_the_published_one(
    bits: int, published: float, tolerance: float
) -> None:
    left_over = coordinate_codebook(GAUSSIAN, bits - 1).distortion
    assert math.pi / 2 * left_over == pytest.approx(published, abs=tolerance)


def prod_error(bits: int, n_draws: int) -> float:
    """d times the mean squared error of q . k over unit q, k and draws of the projection."""
    q, k = (torch.nn.functional.normalize(gaussian(s, 300, HEAD_DIM), dim=-1) for s in (1, 2))
    generator = np.random.default_rng(3)
    rotation = Rotation("haar", HEAD_DIM, seed=4)
    errors = []
    for _ in range(n_draws):
        method = TurboQuantProd.sample(bits, HEAD_DIM, generator, rotation)
        errors.append((method.logits(q, k) - q @ k.T).square().mean())
    return HEAD_DIM * float(torch.stack(errors).mean())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_prod_error_is_predicted_and_larger_than_plain_mse(bits: int) -> None:
    method = TurboQuantProd.sample(bits, HEAD_DIM, np.random.default_rng(0))
    measured = prod_error(bits, n_draws=12)
    # One projection serves 300 keys and 300 queries; between draws the mean scatters by 1.5 %.
    assert measured == pytest.approx(method.inner_product_error, rel=0.03)
    q, k = (torch.nn.functional.normalize(gaussian(s, 300, HEAD_DIM), dim=-1) for s in (1, 2))
    plain = TurboQuantMse(bits, HEAD_DIM).logits(q, k) - q @ k.T
    assert HEAD_DIM * float(plain.square().mean()) < measured / 3


@pytest.mark.parametrize("bits", [2, 3])
def test_prod_is_unbiased_where_plain_mse_shrinks(bits: int) -> None:
    k = torch.nn.functional.normalize(gaussian(9, 1, 32), dim=-1)
    generator = np.random.default_rng(10)
    estimates = torch.stack(
        [
            TurboQuantProd.sample(bits, 32, generator, Rotation("haar", 32, seed)).logits(k, k)
            for seed in range(800)
        ]
    ).flatten()
    standard_error = float(estimates.std()) / math.sqrt(estimates.numel())
    assert float(estimates.mean()) == pytest.approx(1.0, abs=4 * standard_error)
    plain = torch.stack(
        [TurboQuantMse(bits, 32, Rotation("haar", 32, s)).logits(k, k) for s in range(300)]
    )
    # E <k, khat> = 1 - D for centroids that are means: this bias is what prod removes.
    shrunk = 1 - coordinate_codebook(32, bits).distortion
    assert float(plain.mean()) == pytest.approx(shrunk, abs=4 * float(plain.std()) / math.sqrt(300))


def test_prod_at_one_bit_is_qjl() -> None:
    residual = Qjl.sample(32, 32, np.random.default_rng(0))
    q, k = gaussian(1, 5, 32), gaussian(2, 7, 32)
    assert torch.equal(TurboQuantProd(1, residual).logits(q, k), residual.logits(q, k))


def test_rates_count_the_norms() -> None:
    residual = Qjl.sample(64, 64, np.random.default_rng(0))
    assert TurboQuantMse(3, 64).rate(64, 10) == 3.25
    assert TurboQuantProd(3, residual).rate(64, 10) == 3.5
    assert TurboQuantProd(1, residual).rate(64, 10) == 1.25


def test_settings_that_mean_nothing_are_refused() -> None:
    wide = Qjl.sample(32, 64, np.random.default_rng(0))
    for build in (
        lambda: TurboQuantMse(0, 64),
        lambda: TurboQuantMse(9, 64),
        lambda: TurboQuantProd(0, Qjl.sample(32, 32, np.random.default_rng(0))),
        lambda: TurboQuantProd(2, wide),
        lambda: TurboQuantMse(3, 64).rate(128, 10),
        lambda: TurboQuantMse(3, 64).reconstruct(torch.ones(2, 128)),
    ):
        with pytest.raises(CodeError):
            build()
