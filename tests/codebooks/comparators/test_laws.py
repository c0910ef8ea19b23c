"""What every comparator owes, whatever its paper."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_codebooks.comparators.catalogue import (
    MethodPair,
    calibrated_methods,
    published_methods,
)
from sphkv_codebooks.comparators.float8 import Float8
from sphkv_codebooks.comparators.interface import Comparator, LogitEstimator, VectorQuantizer
from sphkv_codebooks.comparators.kivi import KiviKeys, KiviValues
from sphkv_codebooks.comparators.turboquant_mse import TurboQuantMse
from sphkv_codebooks.comparators.turboquant_prod import TurboQuantProd
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.rotation import Rotation

HEAD_DIM = 64


def vectors(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


PAIRS = published_methods(
    HEAD_DIM, Rotation("hadamard", HEAD_DIM, 3), np.random.default_rng(0), bits=(1, 3)
) + calibrated_methods(vectors(99, 300, HEAD_DIM), torch.Generator().manual_seed(0))
SIDES: dict[str, Comparator] = {pair.keys.name: pair.keys for pair in PAIRS}
SIDES |= {pair.values.name: pair.values for pair in PAIRS if pair.values is not None}
QUANTIZERS = {n: m for n, m in SIDES.items() if isinstance(m, VectorQuantizer)}
every_side = pytest.mark.parametrize("method", SIDES.values(), ids=SIDES.keys())
every_quantizer = pytest.mark.parametrize("method", QUANTIZERS.values(), ids=QUANTIZERS.keys())


# fp8 without a scale saturates and underflows: test_integer_and_float8 has it.
EQUIVARIANT = {n: m for n, m in SIDES.items() if m != Float8(has_scale=False)}
GROUPED = {n: m for n, m in SIDES.items() if m.token_group > 1}


def answer(method: Comparator, x: torch.Tensor) -> torch.Tensor:
    """The reconstruction, or for an estimator its logits against a fixed set of queries."""
    if isinstance(method, VectorQuantizer):
        return method.reconstruct(x)
    return method.logits(vectors(5, 4, HEAD_DIM).to(x.dtype), x).transpose(-1, -2)


def test_every_method_of_the_comparison_is_here() -> None:
    names = " / ".join(SIDES)
    for word in (
        "TurboQuant-MSE",
        "TurboQuant-prod",
        "QJL",
        "DRIVE",
        "EDEN",
        "KIVI-2",
        "KIVI-4",
        "int4",
        "int8",
        "fp8 e4m3, no scale",
        "fp8 e4m3 per token",
        "PolarQuant 4/2/2/2",
        "Wu et al.",
        "g16 K64",
        "g16 K16",
        "g32 K8",
    ):
        assert word in names
    assert len({pair.name for pair in PAIRS}) == len(PAIRS)
    assert all(m.source for m in SIDES.values())


@pytest.mark.parametrize("method", EQUIVARIANT.values(), ids=EQUIVARIANT.keys())
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n_tokens=st.integers(1, 140), power=st.integers(1, 6))
def test_scaling_by_a_power_of_two_scales_the_answer(
    method: Comparator, seed: int, n_tokens: int, power: int
) -> None:
    x = vectors(seed, n_tokens, HEAD_DIM)
    # Powers of two are exact in float64 and in fp16 alike, so equality is exact but for sums
    # that torch orders differently: none here.
    assert torch.equal(answer(method, 2.0**power * x), 2.0**power * answer(method, x))


@every_side
@pytest.mark.parametrize("n_tokens", [1, 32, 129])
def test_zero_vectors_come_back_as_zero(method: Comparator, n_tokens: int) -> None:
    zeros = torch.zeros(n_tokens, HEAD_DIM)
    assert torch.equal(answer(method, zeros), torch.zeros_like(answer(method, zeros)))


@every_side
def test_zero_vectors_among_others_spread_no_nan(method: Comparator) -> None:
    x = vectors(1, 129, HEAD_DIM)
    x[::5] = 0
    assert torch.isfinite(answer(method, x)).all()


@every_side
def test_leading_dimensions_are_a_batch(method: Comparator) -> None:
    x = vectors(2, 2, 3, 129, HEAD_DIM)
    whole = answer(method, x)
    for i, j in itertools.product(range(2), range(3)):
        # Batched products may be summed in another order.
        torch.testing.assert_close(whole[i, j], answer(method, x[i, j]), rtol=1e-10, atol=1e-10)


@every_side
def test_tokens_of_other_groups_do_not_matter(method: Comparator) -> None:
    group = method.token_group
    x = vectors(3, 3 * group, HEAD_DIM)
    poisoned = x.clone()
    poisoned[:group] *= 100
    poisoned[2 * group :] *= 100
    own = slice(group, 2 * group)
    torch.testing.assert_close(
        answer(method, poisoned)[own], answer(method, x)[own], rtol=1e-10, atol=1e-10
    )


def test_keys_per_channel_and_paged_radii_are_the_grouped_ones() -> None:
    assert {m.token_group for m in GROUPED.values()} == {32, 128}
    assert len(GROUPED) == 7  # KIVI keys, Wu et al. at two settings each, three k-means tiers


@pytest.mark.parametrize("method", GROUPED.values(), ids=GROUPED.keys())
def test_token_group_says_truly_who_shares_statistics(method: Comparator) -> None:
    x = vectors(4, method.token_group, HEAD_DIM)
    louder = x.clone()
    louder[0] *= 100
    assert not torch.equal(answer(method, louder)[1:], answer(method, x)[1:])


@every_side
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_dtype_are_kept(method: Comparator, dtype: torch.dtype) -> None:
    x, q = vectors(6, 2, 63, HEAD_DIM).to(dtype), vectors(7, 2, 5, HEAD_DIM).to(dtype)
    logits = method.logits(q, x)
    assert logits.shape == (2, 5, 63) and logits.dtype == dtype
    if isinstance(method, VectorQuantizer):
        decoded = method.reconstruct(x)
        assert decoded.shape == x.shape and decoded.dtype == dtype


@every_quantizer
def test_logits_are_those_of_the_reconstruction(method: VectorQuantizer) -> None:
    x, q = vectors(8, 65, HEAD_DIM), vectors(9, 5, HEAD_DIM)
    expected = torch.einsum("qd,td->qt", q, method.reconstruct(x))
    torch.testing.assert_close(method.logits(q, x), expected)


@every_side
def test_the_input_is_left_alone(method: Comparator) -> None:
    x = vectors(10, 130, HEAD_DIM)
    before = x.clone()
    answer(method, x)
    assert torch.equal(x, before)


@every_side
def test_the_rate_never_rises_over_whole_groups(method: Comparator) -> None:
    rates = [method.rate(HEAD_DIM, n * 128) for n in (1, 2, 8)]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] <= method.rate(HEAD_DIM, 129) <= 16.0
    with pytest.raises(CodeError):
        method.rate(HEAD_DIM, 0)


@every_side
def test_half_precision_and_bare_vectors_are_refused(method: Comparator) -> None:
    for wrong in (torch.ones(4, HEAD_DIM, dtype=torch.float16), torch.ones(HEAD_DIM)):
        with pytest.raises(CodeError):
            answer(method, wrong)


LADDERS = [
    [f"{method} {bits} bit" for bits in (1, 2, 3, 4, 5)]
    for method in ("TurboQuant-MSE", "TurboQuant-prod")
] + [
    [f"{'DRIVE' if b == 1 else 'EDEN'} {b} bit, {gain}" for b in (1, 2, 3, 4, 5)]
    for gain in ("least squares", "unbiased", "matched norm")
]
LADDERS += [
    ["QJL 64 signs", "QJL 128 signs", "QJL 256 signs"],
    ["KIVI-2", "KIVI-4"],
    ["int4 per token", "int8 per token"],
    ["PolarQuant (Wu et al.) r3 t3", "PolarQuant (Wu et al.) r4 t4"],
    ["spherical k-means g32 K8", "spherical k-means g16 K16", "spherical k-means g16 K64"],
]


@pytest.mark.parametrize("ladder", LADDERS, ids=lambda names: names[-1])
def test_more_bits_never_hurt(ladder: list[str]) -> None:
    methods = {
        pair.name: pair
        for pair in published_methods(HEAD_DIM, None, np.random.default_rng(0))
        + calibrated_methods(vectors(99, 3000, HEAD_DIM), torch.Generator().manual_seed(0))
    }
    x, q = vectors(11, 1024, HEAD_DIM), vectors(12, 128, HEAD_DIM)
    rates = [methods[name].keys.rate(HEAD_DIM, 1024) for name in ladder]
    errors = [float((methods[name].keys.logits(q, x) - q @ x.T).square().mean()) for name in ladder]
    assert rates == sorted(rates) and len(set(rates)) == len(rates)
    assert errors == sorted(errors, reverse=True)


def test_a_pair_weighs_both_sides() -> None:
    pair = MethodPair("KIVI-2", KiviKeys(2), KiviValues(4))
    assert pair.rate(HEAD_DIM, 64) == 4.0
    assert MethodPair("keys alone", KiviKeys(2), None).rate(HEAD_DIM, 64) == (3 + 16) / 2
    with pytest.raises(CodeError, match="values"):
        MethodPair("wrong way round", KiviKeys(2), KiviKeys(2))
    with pytest.raises(CodeError, match="keys"):
        MethodPair("wrong way round", KiviValues(2), None)


def test_estimators_are_for_keys_and_rotations_are_not_optional_for_outliers() -> None:
    for method in SIDES.values():
        if isinstance(method, LogitEstimator):
            assert method.roles == {"keys"}
    x = vectors(13, 64, HEAD_DIM)
    x[:, 7] *= 30
    with_rotation = TurboQuantMse(3, HEAD_DIM, Rotation("hadamard", HEAD_DIM, 1))
    errors = [
        float((m.reconstruct(x) - x).square().sum() / x.square().sum())
        for m in (with_rotation, TurboQuantMse(3, HEAD_DIM))
    ]
    assert errors[1] > 5 * errors[0]


def test_projections_do_not_share_the_rotations_stream() -> None:
    pairs = published_methods(HEAD_DIM, None, np.random.default_rng(42), bits=(1,))
    (first,) = (p.keys for p in pairs if p.name == "TurboQuant-prod 1 bit")
    assert isinstance(first, TurboQuantProd)
    # Rotation("haar", d, 42) is the QR of this very matrix: projecting with it would turn the
    # rotated coordinates into those of a triangle.
    shared = np.random.default_rng(42).standard_normal((HEAD_DIM, HEAD_DIM))
    correlation = np.corrcoef(first.residual.projection.ravel(), shared.ravel())[0, 1]
    assert abs(correlation) < 5 / HEAD_DIM  # 4096 independent pairs: 1/64 is one sigma
