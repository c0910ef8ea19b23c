"""Digits of any radix: exact round trips, the fewest whole bits, loud overflow."""

import math
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.bit_fields import pack_fields, unpack_fields
from sphkv_kernels.mixed_radix import (
    digit_fields,
    digit_layout,
    digits_of,
    radix_words,
    word_bits,
)
from sphkv_kernels.token_stream import angle_bits, pack_stream, row_bytes, unpack_stream


@given(radices=st.lists(st.integers(2, 300), min_size=1, max_size=90), seed=st.integers(0, 2**31))
def test_unpacking_returns_the_digits(radices: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    limits = torch.tensor(radices)
    digits = (torch.rand((5, len(radices)), generator=generator) * limits).long()
    digits[0], digits[1] = 0, limits - 1
    rows = pack_fields(digit_fields(digits, tuple(radices)), -(-word_bits(tuple(radices)) // 8))
    groups = unpack_fields(rows, digit_layout(tuple(radices)))
    assert torch.equal(digits_of(groups, tuple(radices)), digits)


@given(radices=st.lists(st.integers(2, 300), min_size=1, max_size=90).map(tuple))
def test_every_word_loses_less_than_one_bit(radices: tuple[int, ...]) -> None:
    words = radix_words(radices)
    entropy = sum(math.log2(radix) for radix in radices)
    assert entropy - 1e-6 <= word_bits(radices) < entropy + len(words)
    assert [word.first for word in words] == [0, *(word.stop for word in words[:-1])]
    assert words[-1].stop == len(radices)


@settings(max_examples=40)
@given(radices=st.lists(st.sampled_from([3, 5, 12, 250, 2**20, 2**40]), min_size=1, max_size=8))
def test_no_other_cut_needs_fewer_bits(radices: list[int]) -> None:
    def bits(cuts: tuple[int, ...]) -> float:
        ends = (0, *cuts, len(radices))
        words = [math.prod(radices[a:b]) for a, b in pairwise(ends)]
        widths = [(word - 1).bit_length() for word in words]
        return math.inf if max(widths) > 62 else sum(widths)

    places = range(1, len(radices))
    best = min(bits(cuts) for n in range(len(radices)) for cuts in combinations(places, n))
    assert word_bits(tuple(radices)) == best


def test_the_row_is_the_positional_number_itself() -> None:
    radices, digits = (3, 5, 7), (2, 4, 6)
    rows = pack_fields(digit_fields(torch.tensor([digits]), radices), 1)
    assert rows.tolist() == [[2 + 3 * 4 + 15 * 6]]  # 104 of 105 values: 7 bits
    assert word_bits(radices) == 7


def test_a_digit_outside_its_radix_is_refused() -> None:
    with pytest.raises(ValueError, match="outside its radix"):
        digit_fields(torch.tensor([[3]]), (3,))
    with pytest.raises(ValueError, match="radix of 2"):
        radix_words((1,))


@pytest.mark.parametrize("n_cells", [(12, 5, 3, 3, 1, 7), (16, 5, 4, 3), (13, 6)])
def test_a_code_of_any_cells_is_stored_at_its_rate(n_cells: tuple[int, ...]) -> None:
    radius = "norm" if len(n_cells) == 6 else "lloyd_max:2"
    code = SphericalCode.analytic("any", 64, radius=radius, n_cells=n_cells)
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(3))
    encoded = code.encode(x)
    rows = pack_stream(code, encoded)
    assert torch.equal(code.decode(unpack_stream(code, rows)), code.decode(encoded))
    # At most one bit a word (4 words of about 60 bits hold 64 coordinates) and whole bytes.
    assert code.bits_per_vector <= 8 * row_bytes(code) <= code.bits_per_vector + 4 + 7
    per_vector = code.n_radii * code.radius_coding.bits_per_radius + code.radius_coding.norm_bits
    assert 8 * row_bytes(code) == -(-(angle_bits(64, n_cells) + per_vector) // 8) * 8
