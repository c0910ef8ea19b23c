"""Sentences of an evaluation: how much a factor is."""

import pytest

from sphkv_cli.evaluation.reading import times_text


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
