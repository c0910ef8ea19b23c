"""The exact definition of encoding: against a scalar oracle, float64 angles, other company."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_codebooks import vector_coder
from sphkv_codebooks.codebook import Codebook
from sphkv_codebooks.density import HALF_PI, TWO_PI, SinPower, UniformCircle
from sphkv_codebooks.encoded import EncodedVectors
from sphkv_codebooks.encoder import encode_pairs, pair_radius
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.histogram_lloyd import lloyd_max_samples
from sphkv_codebooks.lloyd_max import lloyd_max
from sphkv_codebooks.spherical_code import Gain, SphericalCode

F32 = np.float32


def circle_books() -> list[Codebook]:
    rng = np.random.default_rng(2)
    uneven = np.mod(rng.normal(1.0, 1.2, 4000), TWO_PI)
    turned = np.mod(np.arange(8) * TWO_PI / 8 + 0.2, TWO_PI)
    return [
        *(lloyd_max(UniformCircle(), n_cells) for n_cells in (1, 2, 3, 4, 7, 8, 12, 16, 32)),
        lloyd_max_samples(uneven, 1, 16),
        lloyd_max_samples(uneven, 1, 5),
        Codebook(1, np.mod(turned + np.pi / 8, TWO_PI), turned, is_circle=True),
    ]


def upper_books() -> list[Codebook]:
    return [lloyd_max(SinPower(level), n) for level, n in [(2, 1), (2, 2), (3, 4), (4, 7), (2, 33)]]


def code_by_definition(book: Codebook, first: np.float32, second: np.float32) -> int:
    """The text of encoder.py, one pair at a time, in float32 scalars and no shared code."""
    if not book.is_circle:
        return sum(
            bool(second * F32(math.cos(t)) >= first * F32(math.sin(t))) for t in book.thresholds
        )
    signs = bool(np.signbit(first)), bool(np.signbit(second))
    quadrant = [(False, False), (True, False), (True, True), (False, True)].index(signs)
    local_first, local_second = abs(first), abs(second)
    if quadrant % 2:
        local_first, local_second = local_second, local_first
    passed = 0
    for threshold in book.thresholds:
        its_quadrant = math.floor(threshold / HALF_PI + 1e-12)
        local = threshold - its_quadrant * HALF_PI
        local = 0.0 if abs(local) < 1e-12 else local
        if its_quadrant < quadrant:
            passed += 1
        elif its_quadrant == quadrant:
            passed += bool(
                local_second * F32(math.cos(local)) >= local_first * F32(math.sin(local))
            )
    return (passed - 1) % book.n_cells


def awkward_pairs(count: int, seed: int) -> npt.NDArray[np.float32]:
    """(count, 2) pairs over all magnitudes, with zeros, signed zeros and axes among them."""
    rng = np.random.default_rng(seed)
    pairs = rng.standard_normal((count, 2)) * 10.0 ** rng.integers(-6, 6, (count, 1))
    special = np.array([0.0, -0.0, 1.0, -1.0])
    grid = np.stack(np.meshgrid(special, special), axis=-1).reshape(-1, 2)
    return np.concatenate([pairs, grid]).astype(np.float32)


@pytest.mark.parametrize("book", circle_books() + upper_books(), ids=lambda b: f"{b.n_cells}")
def test_codes_follow_the_written_definition(book: Codebook) -> None:
    pairs = awkward_pairs(300, 3)
    # Pairs that lie on thresholds to the last bit make ties likely.
    edges = np.concatenate([book.thresholds, [0.0]])
    pairs = np.concatenate([pairs, np.stack([np.cos(edges), np.sin(edges)], -1).astype(F32)])
    if not book.is_circle:
        pairs = np.abs(pairs)
    codes = encode_pairs(book, *torch.from_numpy(pairs).T.contiguous())
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [code_by_definition(book, *pair) for pair in pairs]


@pytest.mark.parametrize("book", circle_books() + upper_books(), ids=lambda b: f"{b.n_cells}")
def test_codes_are_the_cells_of_float64_angles(book: Codebook) -> None:
    """Away from thresholds by more than float32 rounding, the code is the cell of atan2."""
    pairs = torch.from_numpy(awkward_pairs(4000, 4)[:4000])
    if not book.is_circle:
        pairs = pairs.abs()
    angles = torch.atan2(pairs[:, 1].double(), pairs[:, 0].double()).remainder(TWO_PI)
    gap = np.abs(angles.numpy()[:, None] - np.append(book.thresholds, [0.0, TWO_PI])).min(axis=1)
    clear = torch.from_numpy(gap > 1e-6)
    assert int(clear.sum()) > 3900
    codes = encode_pairs(book, *pairs.T.contiguous())
    assert (codes == book.encode(angles))[clear].all()


def test_exact_tie_goes_to_the_upper_cell() -> None:
    """Two cells meet at pi/4, where cos = sin: the pair (r, r) is a tie for every r."""
    book = lloyd_max(SinPower(2), 2)
    assert book.thresholds.tolist() == [np.pi / 4]
    r = torch.tensor([1.0, 3.0, 1e-20, 7e8])
    assert encode_pairs(book, r, r).tolist() == [1, 1, 1, 1]
    assert encode_pairs(book, r, r * (1 - 1e-6)).tolist() == [0, 0, 0, 0]


def parts(encoded: EncodedVectors) -> list[torch.Tensor]:
    stored = (encoded.radius_codes, encoded.radii, encoded.norms)
    return [*encoded.angle_codes, *(part for part in stored if part is not None)]


def same_bits(left: EncodedVectors, right: EncodedVectors) -> bool:
    pairs = zip(parts(left), parts(right), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@cache
def some_codes() -> list[SphericalCode]:
    gains: tuple[Gain, ...] = ("none", "least_squares", "unbiased")
    return [
        SphericalCode.analytic("paper", 64),
        SphericalCode.analytic("rope", 64, pairing="rope"),
        *(SphericalCode.analytic(g, 64, (4, 2, 2, 2), "lloyd_max:2", gain=g) for g in gains),
        *(SphericalCode.analytic(g, 64, (3, 2, 1, 2, 1, 3), "norm", gain=g) for g in gains),
        SphericalCode.analytic("odd", 64, n_cells=(12, 3, 5), radius="minifloat:5,6"),
        SphericalCode.analytic("silent", 64, (3, 0, 1), "fp16"),
    ]


@pytest.mark.parametrize("code", some_codes(), ids=lambda c: c.name)
def test_a_vector_has_the_same_code_alone_and_in_any_company(
    code: SphericalCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vector lanes, chunk borders and memory layout must not show in the bits."""
    x = torch.randn(67, 64, generator=torch.Generator().manual_seed(1))
    together = code.encode(x)
    for index in (0, 1, 33, 66):
        assert same_bits(code.encode(x[index]), together[index])
    monkeypatch.setattr(vector_coder, "_CHUNK_CPU", 5)
    assert same_bits(code.encode(x), together)
    strided = torch.randn(67, 128)[:, ::2].copy_(x)
    assert same_bits(code.encode(strided), together)
    assert same_bits(code.encode(x.reshape(67, 1, 64)).reshape((67,)), together)


@pytest.mark.parametrize("code", some_codes(), ids=lambda c: c.name)
@pytest.mark.parametrize("leading", [(), (1,), (0,), (3, 0, 2), (2, 3, 65), (63,)])
def test_any_leading_shape(code: SphericalCode, leading: tuple[int, ...]) -> None:
    x = torch.randn(*leading, 64, generator=torch.Generator().manual_seed(2))
    encoded = code.encode(x)
    assert encoded.shape == torch.Size(leading)
    for level, codes in enumerate(encoded.angle_codes, start=1):
        assert codes.shape == (*leading, 64 >> level)
        assert codes.dtype == torch.uint8
        if codes.numel():
            assert int(codes.max()) < code.n_cells[level - 1]
    decoded = code.decode(encoded)
    assert decoded.shape == x.shape
    assert decoded.dtype == torch.float32


@pytest.mark.parametrize("code", some_codes(), ids=lambda c: c.name)
def test_zero_vector_comes_back_as_zero(code: SphericalCode) -> None:
    x = torch.zeros(3, 64)
    x[1, 5] = 1.0  # a vector with zero blocks beside zero vectors
    decoded = code.decode(code.encode(x))
    assert (decoded[[0, 2]] == 0).all()
    assert torch.isfinite(decoded).all()
    assert decoded[1].norm() > 0.2


@pytest.mark.parametrize("code", some_codes(), ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_read_as_float32(code: SphericalCode, dtype: torch.dtype) -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert same_bits(code.encode(x), code.encode(x.to(torch.float32)))


@given(st.integers(0, 1000), st.integers(-12, 9), st.sampled_from(range(len(some_codes()))))
@settings(max_examples=60, deadline=None)
def test_angles_do_not_depend_on_scale(seed: int, exponent: int, which: int) -> None:
    """Scaling by a power of two is exact in float32: the angle codes stay, the radii scale."""
    code = some_codes()[which]
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    scaled = code.encode(x * 2.0**exponent)
    plain = code.encode(x)
    for left, right in zip(scaled.angle_codes, plain.angle_codes, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("code", some_codes(), ids=lambda c: c.name)
def test_norms_beyond_float16_are_refused_or_saturate(code: SphericalCode) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    unit = x / x.norm(dim=-1, keepdim=True)
    fits = code.decode(code.encode(unit * 5e4))
    assert torch.isfinite(fits).all()
    huge = unit * 1e7
    with pytest.raises(CodeError, match=r"does not fit .*scale the vectors down"):
        code.encode(huge)
    decoded = code.decode(code.encode(huge, check=False))
    assert torch.isfinite(decoded).all()
    # Every stored radius saturates at 65504 or, for minifloat, at its largest value.
    assert decoded.norm(dim=-1).max() <= 65504 * math.sqrt(code.n_radii) * 1.5
    with pytest.raises(CodeError, match="does not fit"):
        code.encode(unit * 1e25)  # its square is no float32 number any more


@pytest.mark.parametrize("code", some_codes(), ids=lambda c: c.name)
def test_norms_below_float16_fade_to_zero(code: SphericalCode) -> None:
    """Float16 ends at 6e-8: smaller radii become zero, subnormal ones lose digits, none fails."""
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(5))
    unit = x / x.norm(dim=-1, keepdim=True)
    for scale in (1e-9, 1e-20, 1e-30):
        assert (code.decode(code.encode(unit * scale)) == 0).all()
    error = (code.decode(code.encode(unit * 1e-5)) - unit * 1e-5).norm(dim=-1)
    # Half a step of the subnormal grid, 2^-25, per stored radius on top of the code's own error.
    ordinary = (code.decode(code.encode(unit)) - unit).norm(dim=-1)
    grid = 2.0**-25 * math.sqrt(code.n_radii) * 1.5
    assert (error <= 1e-5 * ordinary * 1.01 + grid).all() or "minifloat" in code.radius_coding.spec


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("code", some_codes(), ids=lambda c: c.name)
def test_nan_and_inf_are_refused_wherever_they_sit(code: SphericalCode, bad: float) -> None:
    for position in (0, 17, 63):
        x = torch.randn(5000, 64)
        x[4321, position] = bad
        with pytest.raises(CodeError, match="NaN or Inf"):
            code.encode(x)


def test_wrong_shapes_and_types_are_refused() -> None:
    code = SphericalCode.analytic("paper", 64)
    with pytest.raises(CodeError, match=r"head_dim 64, got a tensor \(3, 128\)"):
        code.encode(torch.zeros(3, 128))
    with pytest.raises(CodeError, match=r"floating point vectors, got torch\.int64"):
        code.encode(torch.zeros(3, 64, dtype=torch.int64))
    encoded = code.encode(torch.zeros(3, 64))
    other = SphericalCode.analytic("deep", 64, (4, 2, 2, 2, 2, 2), "norm")
    with pytest.raises(CodeError, match="belong to another code"):
        other.decode(encoded)
    with_norm = SphericalCode.analytic("norms", 64, radius="lloyd_max:2")
    with pytest.raises(CodeError, match="carry no radius_codes"):
        with_norm.decode(encoded)
    with pytest.raises(CodeError, match="float32 or float64"):
        code.decode(encoded, torch.float16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("code", some_codes(), ids=lambda c: c.name)
def test_codes_on_the_gpu_are_those_of_the_cpu(code: SphericalCode) -> None:
    x = torch.randn(3001, 64, generator=torch.Generator().manual_seed(6))
    on_gpu = code.encode(x.cuda())
    assert same_bits(on_gpu.to("cpu"), code.encode(x))
    assert torch.equal(code.decode(on_gpu).cpu(), code.decode(code.encode(x)))


def test_radii_are_correctly_rounded() -> None:
    """The float64 root of the float32 sum, rounded once: double rounding cannot hurt a root."""
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn((2, 100_000), generator=generator)
    squares = (first.numpy() ** 2 + second.numpy() ** 2).astype(np.float64)
    expected = np.sqrt(squares).astype(np.float32)
    assert (pair_radius(first, second).numpy() == expected).all()
