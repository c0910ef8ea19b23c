"""A budget reads the same in every form, and a wrong one says what is wrong."""

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from sphkv_cli.allocation.budget import Budget, least_budget, most_budget
from sphkv_cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("3b", 375),
        ("3 bits", 375),
        (" 3.0bit ", 375),
        ("0.1875x", 375),
        ("18.75%", 375),
        ("18.75 %", 375),
        ("375B", 375),
        ("1KiB", 1024),
        ("1kB", 1000),
        (".5KiB", 512),
        ("1e3B", 1000),
        ("12MiB", 12 * 2**20),
        ("2GB", 2 * 10**9),
    ],
)
def test_every_form_means_its_bytes(text: str, n_bytes: int) -> None:
    assert Budget.parse(text).resolve(1000).n_bytes == n_bytes


@given(st.floats(0.01, 16, allow_nan=False), st.integers(1000, 10**9))
def test_the_three_forms_agree(bits: float, n_coordinates: int) -> None:
    resolved = Budget.parse(f"{bits!r}b").resolve(n_coordinates)
    # A budget is whole bytes, rounded down.
    assert 0 <= bits - resolved.bits_per_coordinate < 8 / n_coordinates + 1e-9
    assert resolved.fraction == pytest.approx(resolved.bits_per_coordinate / 16)
    same = Budget.parse(f"{resolved.n_bytes}B").resolve(n_coordinates)
    assert same == resolved


def test_all_three_forms_are_printed() -> None:
    text = Budget.parse("3b").resolve(1_000_000).describe()
    assert text == "375,000 bytes = 3 bits per coordinate = 18.75 % of bf16"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("-3b", "negative"),
        ("-1e9B", "negative"),
        ("3", "no unit"),
        ("", "cannot be read"),
        ("three bits", "cannot be read"),
        ("3b4", "cannot be read"),
        ("3 mib", "unknown unit 'mib'"),
        ("nan b", "cannot be read"),
        ("0x", "positive"),
        ("1e999B", "finite"),
        ("3b\n4b", "cannot be read"),
    ],
)
def test_wrong_budgets_say_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        Budget.parse(text)
    assert caught.value.exit_code == 2
    assert repr(text) in str(caught.value)


def test_budgets_outside_the_layout_are_refused_with_the_limit() -> None:
    resolved = Budget.parse("3b").resolve(8000)
    resolved.check(minimum_bytes=3000, dense_bytes=3000, document="a")
    with pytest.raises(
        UsageError, match=r"of a is below its metadata, 3,001 bytes.*at least 3.001b"
    ):
        resolved.check(minimum_bytes=3001, dense_bytes=9000, document="a")
    with pytest.raises(UsageError, match=r"of a is above its dense cache, 2,999 bytes"):
        resolved.check(minimum_bytes=0, dense_bytes=2999, document="a")


@given(st.integers(1, 10**9), st.integers(1000, 10**9))
@example(105_984, 1_474_560)  # .575b, whose binary fraction is a byte short
def test_a_limit_that_a_refusal_names_is_accepted(n_bytes: int, n_coordinates: int) -> None:
    least = Budget.parse(least_budget(n_bytes, n_coordinates)).resolve(n_coordinates)
    assert least.n_bytes >= n_bytes
    # At most two thousandths of a bit more than it takes.
    assert least.n_bytes <= n_bytes + 2 * n_coordinates / 8000
    most = most_budget(n_bytes, n_coordinates)
    if most != "0b":
        assert Budget.parse(most).resolve(n_coordinates).n_bytes <= n_bytes
