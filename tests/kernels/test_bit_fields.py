"""Laws of the bit fields: exact round trips, least significant bit first, loud overflow."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sphkv_kernels.bit_fields import (
    float16_bits,
    float16_from_bits,
    pack_fields,
    unpack_fields,
)


@given(
    layout=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 16)), min_size=1, max_size=6),
    spare_bytes=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_unpacking_returns_what_was_packed(
    layout: list[tuple[int, int]], spare_bytes: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = [
        (torch.randint(0, 1 << width, (3, count), generator=generator), width)
        for count, width in layout
    ]
    row_bytes = -(-sum(count * width for count, width in layout) // 8) + spare_bytes
    rows = pack_fields(groups, row_bytes)
    assert rows.shape == (3, row_bytes)
    for unpacked, (values, _) in zip(unpack_fields(rows, layout), groups, strict=True):
        assert torch.equal(unpacked, values)


def test_rows_are_the_little_endian_sum_of_shifted_fields() -> None:
    values = [5, 1, 0x1234, 7, 63]
    widths = [3, 1, 16, 5, 6]
    expected, shift = 0, 0
    for value, width in zip(values, widths, strict=True):
        expected |= value << shift
        shift += width
    groups = [(torch.tensor([[v]]), w) for v, w in zip(values, widths, strict=True)]
    assert bytes(pack_fields(groups, 4)[0].tolist()) == expected.to_bytes(4, "little")


def test_a_field_never_leaks_into_its_neighbour() -> None:
    with pytest.raises(ValueError, match="does not fit 3 bits"):
        pack_fields([(torch.tensor([[8]]), 3)], 1)
    with pytest.raises(ValueError, match="does not fit 3 bits"):
        pack_fields([(torch.tensor([[-1]]), 3)], 1)
    with pytest.raises(ValueError, match="do not fit a row of 1 bytes"):
        pack_fields([(torch.tensor([[1, 2, 3]]), 3)], 1)


def test_float16_patterns_survive_including_nan_and_infinity() -> None:
    patterns = torch.arange(1 << 16)
    assert torch.equal(float16_bits(float16_from_bits(patterns)), patterns)
