"""Laws of the page layout: exact round trips, the byte formula, no byte written twice."""

from math import log2

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_codebooks.encoded import EncodedVectors
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.block_words import native_layout_of
from sphkv_kernels.layout import Operand
from sphkv_kernels.mixed_radix import word_bits
from sphkv_kernels.pages import (
    pack_keys,
    pack_region,
    pack_values,
    page_bytes,
    region_bytes,
    unpack_region,
)
from sphkv_kernels.tier import PageError, RegionFormat, TierFormat
from tests.kernels.cases import NATIVE_CODES, even_code, even_codes, parts, random_stored

PAGE_SIZES = (16, 32, 64)
operands: st.SearchStrategy[Operand] = st.sampled_from(["key", "value"])


def assert_round_trip(
    region_format: RegionFormat, operand: Operand, head_dim: int, page_size: int, seed: int
) -> None:
    stored = random_stored(region_format, (3, page_size), head_dim, seed)
    regions = pack_region(region_format, operand, stored)
    assert regions.shape == (3, region_bytes(region_format, head_dim, page_size))
    back = unpack_region(region_format, operand, regions, head_dim, page_size)
    for before, after in zip(parts(stored), parts(back), strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)


@settings(max_examples=60, deadline=None)
@given(
    code=even_codes(),
    operand=operands,
    page_size=st.sampled_from(PAGE_SIZES),
    seed=st.integers(0, 2**31),
)
def test_any_code_survives_a_page(
    code: SphericalCode, operand: Operand, page_size: int, seed: int
) -> None:
    assert_round_trip(code, operand, code.head_dim, page_size, seed)


@pytest.mark.parametrize("operand", ["key", "value"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("bits", "radius"), NATIVE_CODES)
def test_native_codes_survive_a_page(
    bits: tuple[int, ...], radius: str, head_dim: int, operand: Operand
) -> None:
    code = even_code(head_dim, tuple(1 << b for b in bits), radius)
    assert native_layout_of(code) is not None
    for page_size in PAGE_SIZES:
        assert_round_trip(code, operand, head_dim, page_size, seed=page_size)


@pytest.mark.parametrize("head_dim", [16, 64, 256])
@pytest.mark.parametrize("kind", ["int8", "dense"])
def test_int8_and_dense_survive_a_page(kind: RegionFormat, head_dim: int) -> None:
    for page_size in PAGE_SIZES:
        assert_round_trip(kind, "key", head_dim, page_size, seed=page_size)


@settings(max_examples=60, deadline=None)
@given(code=even_codes(), page_size=st.sampled_from(PAGE_SIZES))
def test_region_bytes_are_the_formula(code: SphericalCode, page_size: int) -> None:
    if native_layout_of(code) is not None:
        return
    # Whole bits for powers of two, one positional number per word for all other levels.
    whole = [cells & (cells - 1) == 0 for cells in code.n_cells]
    levels = list(zip(code.n_cells, code.n_angles, whole, strict=True))
    bits = sum(count * (cells - 1).bit_length() for cells, count, is_whole in levels if is_whole)
    bits += code.n_radii * code.radius_coding.bits_per_radius + code.radius_coding.norm_bits
    radices = tuple(
        cells for cells, count, is_whole in levels for _ in range(count) if not is_whole
    )
    bits += word_bits(radices)
    expected = page_size * -(-bits // 8)
    assert region_bytes(code, code.head_dim, page_size) == -(-expected // 16) * 16
    # No more than a bit a word over the rate, and words are long: 56 bits or more but the last.
    n_words = -(-sum(map(log2, radices)) // 56) + 1 if radices else 0
    assert bits <= code.bits_per_vector + n_words


@pytest.mark.parametrize(
    ("bits", "radius", "vector_bytes"),
    [
        ((4, 2, 2, 2), "fp16", 64),
        ((4, 2, 2, 2), "lloyd_max:2", 50),
        ((4, 3, 3, 3), "lloyd_max:3", 58),
        ((4, 3, 3, 3), "minifloat:5,6", 64),
        ((5, 3, 3, 3), "lloyd_max:3", 66),
        ((3, 2, 2, 2), "lloyd_max:2", 42),
        ((3, 1, 1, 1), "lloyd_max:1", 34),
    ],
)
def test_native_bytes_of_a_128_dimensional_vector(
    bits: tuple[int, ...], radius: str, vector_bytes: int
) -> None:
    """Block bits rounded to the planes' words, and two bytes where there is a norm."""
    code = even_code(128, tuple(1 << b for b in bits), radius)
    for page_size in PAGE_SIZES:
        assert region_bytes(code, 128, page_size) == page_size * vector_bytes
        tier = TierFormat.spherical(code)
        assert page_bytes(tier, 128, page_size) == 2 * page_size * vector_bytes


def test_int8_and_dense_bytes() -> None:
    assert page_bytes(TierFormat.int8(), 64, 32) == 2 * 32 * 66
    assert page_bytes(TierFormat.dense(), 64, 32) == 2 * 32 * 128


@pytest.mark.parametrize("operand", ["key", "value"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("bits", "radius"), NATIVE_CODES)
def test_every_token_owns_its_bits_alone(
    bits: tuple[int, ...], radius: str, head_dim: int, operand: Operand
) -> None:
    """Changing one token changes no bit that belongs to another: the regions' differences from
    an all-zero page are disjoint, and together they are the page of all tokens."""
    code = even_code(head_dim, tuple(1 << b for b in bits), radius)
    full = random_stored(code, (1, 16), head_dim, seed=7)
    assert isinstance(full, EncodedVectors)
    zero = pack_region(code, operand, _only_token(full, -1))[0]
    together = zero.clone()
    touched = torch.zeros_like(zero)
    for token in range(16):
        difference = pack_region(code, operand, _only_token(full, token))[0] ^ zero
        assert not bool((touched & difference).any())
        touched |= difference
        together ^= difference
    assert torch.equal(together, pack_region(code, operand, full)[0])


def _only_token(stored: EncodedVectors, token: int) -> EncodedVectors:
    def keep(t: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(t)
        if token >= 0:
            out[:, token] = t[:, token]
        return out

    return EncodedVectors(
        tuple(keep(codes) for codes in stored.angle_codes),
        None if stored.radius_codes is None else keep(stored.radius_codes),
        None if stored.radii is None else keep(stored.radii),
        None if stored.norms is None else keep(stored.norms),
    )


def test_a_native_word_as_the_layout_document_spells_it() -> None:
    """4/2/2/2 fp16, head_dim 64, K: token 9 is slot 1 of lane 4; its block 2 belongs to lane 6."""
    code = even_code(64, (16, 4, 4, 4), "fp16")
    level1, level2, level3, level4 = [1, 2, 3, 4, 5, 6, 7, 15], [3, 0, 1, 2], [2, 1], 1
    radius = torch.tensor(1.5, dtype=torch.float16)
    stored = EncodedVectors(
        tuple(torch.zeros((1, 16, 64 >> level), dtype=torch.uint8) for level in (1, 2, 3, 4)),
        None,
        torch.zeros((1, 16, 4), dtype=torch.float16),
    )
    stored.angle_codes[0][0, 9, 16:24] = torch.tensor(level1, dtype=torch.uint8)
    stored.angle_codes[1][0, 9, 8:12] = torch.tensor(level2, dtype=torch.uint8)
    stored.angle_codes[2][0, 9, 4:6] = torch.tensor(level3, dtype=torch.uint8)
    stored.angle_codes[3][0, 9, 2] = level4
    assert stored.radii is not None
    stored.radii[0, 9, 2] = radius
    region = pack_region(code, "key", stored)[0]
    # lane = 4 g + t with g = 9 - 8 and t = 2; a lane owns two 4-byte words, an 8-byte chunk.
    start = (4 * 1 + 2) * 8 + 1 * 4
    word0 = int.from_bytes(bytes(region[start : start + 4].tolist()), "little")
    plane1 = 16 * 4 * 4 + start
    word1 = int.from_bytes(bytes(region[plane1 : plane1 + 4].tolist()), "little")
    assert word0 == sum(c << (4 * i) for i, c in enumerate(level1))
    low = [*level2[:2], level3[0], level4, *level2[2:], level3[1], 3 - level4]
    assert word1 & 0xFFFF == sum(c << (2 * i) for i, c in enumerate(low))
    assert word1 >> 16 == 0x3E00  # 1.5 in fp16


def test_keys_and_values_of_a_tier_go_through_their_own_codes() -> None:
    key_code, value_code = even_code(64, (16, 4), "fp16"), even_code(64, (5, 3, 3), "fp16")
    tier = TierFormat.spherical(key_code, value_code)
    assert tier.name == f"{key_code.name}/{value_code.name}"
    keys = random_stored(key_code, (2, 16), 64, 1)
    values = random_stored(value_code, (2, 16), 64, 2)
    for before, after in (
        (keys, unpack_region(key_code, "key", pack_keys(tier, keys), 64, 16)),
        (values, unpack_region(value_code, "value", pack_values(tier, values), 64, 16)),
    ):
        for x, y in zip(parts(before), parts(after), strict=True):
            assert torch.equal(x, y)


def test_a_tier_rebuilds_from_its_description_bit_for_bit() -> None:
    code = SphericalCode.analytic("a", 64, (4, 2, 2, 2), "lloyd_max:2")
    for tier in (TierFormat.spherical(code), TierFormat.int8(), TierFormat.dense()):
        again = TierFormat.from_description(tier.describe())
        assert again.describe() == tier.describe()
        assert page_bytes(again, 64, 16) == page_bytes(tier, 64, 16)


def test_what_cannot_be_laid_out_is_refused_with_the_value() -> None:
    code = even_code(64, (16, 4), "fp16")
    with pytest.raises(PageError, match="page_size 20"):
        region_bytes(code, 64, 20)
    with pytest.raises(PageError, match="head_dim 64, the cache has 128"):
        region_bytes(code, 128, 16)
    with pytest.raises(PageError, match=r"expected \(n_pages, 2112\)"):
        unpack_region("int8", "key", torch.zeros((1, 7), dtype=torch.uint8), 64, 32)
    with pytest.raises(PageError, match="head_dim 64, value code of 128"):
        TierFormat.spherical(code, even_code(128, (16, 4), "fp16"))
    with pytest.raises(PageError, match="needs key and value codes"):
        TierFormat("x", "spherical", code, None)
    with pytest.raises(PageError, match="'drop' is reserved"):
        TierFormat("drop", "dense")
