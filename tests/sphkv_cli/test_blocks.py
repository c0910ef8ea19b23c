"""What every command prints alike: how much a factor is."""

import pytest

from sphkv_cli.blocks import times_text


@pytest.mark.parametrize(
    ("factor", "text"),
    [
        (1.0, "1"),
        (1.34, "1.3"),
        (9.94, "9.9"),
        (9.96, "10"),
        (20.4, "20"),
        (164.0, "160"),
        (12_345.0, "12,000"),
    ],
)
def test_a_factor_is_two_digits_without_an_exponent(factor: float, text: str) -> None:
    assert times_text(factor) == text


@pytest.mark.parametrize(
    ("factor", "text"),
    [
        (0.0123, "0.0123"),
        (1.0, "1"),
        (2.345, "2.35"),
        (949.4, "949"),
        (12_345.0, "12,300"),
        (1e298, "1e+298"),
    ],
)
def test_a_factor_has_as_many_digits_as_asked(factor: float, text: str) -> None:
    assert times_text(factor, 3) == text
