"""The grouped spherical k-means tiers: what they weigh, and what they can say of isotropic data."""

import itertools
import math

import numpy as np
import pytest
import torch

from sphkv_codebooks.comparators.spherical_kmeans import (
    SPHERICAL_KV_TIERS,
    GroupedSphericalKmeans,
    fit_spherical_kmeans,
)
from sphkv_codebooks.errors import CodeError


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("group_size", "n_directions", "mean_cosine"),
    [(16, 64, 0.574), (16, 16, 0.463), (32, 8, 0.272)],
)
def test_mean_cosine_on_isotropic_data(
    group_size: int, n_directions: int, mean_cosine: float
) -> None:
    fit = torch.randn(30_000, group_size, generator=generator(0))
    held_out = torch.randn(30_000, group_size, generator=generator(1))
    method = fit_spherical_kmeans(fit, group_size, n_directions, generator(2), n_rounds=40)
    decoded = method.reconstruct(held_out)
    cosine = torch.nn.functional.cosine_similarity(decoded, held_out, dim=-1)
    # Different local optima and 30,000 keys instead of all: .0015 below the converged value at
    # most; the mean of 30,000 cosines itself is good to .001.
    assert float(cosine.mean()) == pytest.approx(mean_cosine, abs=0.003)
    # It keeps the norm instead of shrinking, so D = 2 (1 - cosine): .85, 1.07 and 1.46. Two of the
    # three tiers are worse than storing nothing when keys are isotropic.
    weighted = (decoded - held_out).square().sum() / held_out.square().sum()
    assert float(weighted) == pytest.approx(2 * (1 - mean_cosine), rel=0.01)


def random_tier(group_size: int, n_directions: int, head_dim: int = 128) -> GroupedSphericalKmeans:
    raw = np.random.default_rng(0).standard_normal(
        (head_dim // group_size, n_directions, group_size)
    )
    return GroupedSphericalKmeans(raw / np.linalg.norm(raw, axis=-1, keepdims=True))


def test_bits_per_key_are_the_public_ones() -> None:
    tiers = [random_tier(g, k) for g, k in SPHERICAL_KV_TIERS]
    assert [t.bits_per_key for t in tiers] == [112, 96, 44]
    assert [round(t.bits_per_key / 128, 3) for t in tiers] == [0.875, 0.75, 0.344]
    # A full page of 128 tokens adds 8 bytes and one fp32 per group: 2.5 bits a key for 8 groups.
    assert tiers[0].rate(128, 128) == pytest.approx((112 + (64 + 8 * 32) / 128) / 128)
    assert tiers[2].rate(128, 1) == pytest.approx((44 + 64 + 4 * 32) / 128)
    assert tiers[0].table_bytes == 8 * 64 * 16 * 4


def test_directions_that_exist_are_found() -> None:
    truth = torch.nn.functional.normalize(torch.randn(4, 8, generator=generator(3)), dim=-1)
    which = torch.randint(0, 4, (400,), generator=generator(4))
    keys = truth[which] * torch.rand(400, 1, generator=generator(5)).add(0.1)
    # A start may hold one direction twice; the empty ones are then given the key served worst.
    method = fit_spherical_kmeans(keys, 8, 4, generator(6))
    found = torch.tensor(method.directions[0])
    assert (truth @ found.T).amax(-1) == pytest.approx(np.ones(4), abs=1e-5)


def test_more_rounds_never_hurt_the_fit() -> None:
    keys = torch.randn(3000, 16, generator=generator(7))
    unit = torch.nn.functional.normalize(keys, dim=-1)
    gains = []
    for n_rounds in (1, 2, 4, 8, 16):
        method = fit_spherical_kmeans(keys, 16, 16, generator(8), n_rounds)
        directions = torch.tensor(method.directions[0])
        gains.append(float((unit @ directions.T).amax(-1).mean()))
    assert all(later >= earlier - 1e-6 for earlier, later in itertools.pairwise(gains))
    assert gains[-1] > gains[0] + 0.01


def test_groups_have_their_own_directions_and_a_seed_repeats_them() -> None:
    keys = torch.randn(500, 32, generator=generator(9))
    keys[:, 16:] = torch.randn(16, generator=generator(10)) + 0.1 * keys[:, 16:]
    first, again, other = (fit_spherical_kmeans(keys, 16, 8, generator(s)) for s in (1, 1, 2))
    assert np.array_equal(first.directions, again.directions)
    assert not np.array_equal(first.directions, other.directions)
    # The second group is one cluster: its directions all agree, those of the first do not.
    spread = [np.min(group @ group.T) for group in first.directions]
    assert spread[1] > 0.9 and spread[0] < 0.5


def test_every_key_gets_its_best_direction_and_its_radius_in_int8() -> None:
    method = random_tier(16, 16, head_dim=32)
    keys = torch.randn(200, 32, generator=generator(11)).double()
    decoded = method.reconstruct(keys).reshape(200, 2, 16)
    groups = keys.reshape(200, 2, 16)
    for g in range(2):
        cosines = groups[:, g] @ torch.tensor(method.directions[g]).double().T
        best = torch.tensor(method.directions[g]).double()[cosines.argmax(-1)]
        radius = groups[:, g].norm(dim=-1)
        stored = (decoded[:, g] * best).sum(-1)
        largest = torch.cat(
            [radius[:128].amax()[None].expand(128), radius[128:].amax()[None].expand(72)]
        )
        assert ((stored - radius).abs() <= largest / 254 + 1e-6).all()
        assert torch.allclose(decoded[:, g], stored[:, None] * best, atol=1e-6)


def test_pages_do_not_share_their_scales() -> None:
    method = random_tier(16, 16, head_dim=32)
    keys = torch.randn(200, 32, generator=generator(12))
    louder = keys.clone()
    louder[150] *= 1000
    assert torch.equal(method.reconstruct(keys)[:128], method.reconstruct(louder)[:128])
    assert not torch.equal(method.reconstruct(keys)[128:150], method.reconstruct(louder)[128:150])


def test_zero_keys_are_left_out_of_the_fit_and_come_back_as_zero() -> None:
    keys = torch.randn(300, 16, generator=generator(13))
    keys[::3] = 0
    method = fit_spherical_kmeans(keys, 16, 8, generator(14))
    assert torch.equal(method.reconstruct(keys)[::3], keys[::3])


def test_what_cannot_be_fitted_is_refused() -> None:
    keys = torch.randn(10, 32, generator=generator(15))
    for build in (
        lambda: fit_spherical_kmeans(keys, 16, 11, generator(0)),
        lambda: fit_spherical_kmeans(keys, 24, 2, generator(0)),
        lambda: fit_spherical_kmeans(keys[None], 16, 2, generator(0)),
        lambda: fit_spherical_kmeans(keys, 16, 2, generator(0), n_rounds=0),
        lambda: GroupedSphericalKmeans(np.ones((1, 2, 4))),
        lambda: GroupedSphericalKmeans(np.ones((2, 4))),
        lambda: GroupedSphericalKmeans(np.ones((1, 1, 1)), page_size=0),
    ):
        with pytest.raises(CodeError):
            build()
    assert math.isclose(float(np.linalg.norm(random_tier(32, 8).directions[0, 0])), 1, abs_tol=1e-6)
