"""Who wins: only equal bytes are compared, and losing is said."""

import math

import pytest

from sphkv_cli.comparison.candidates import POLAR
from sphkv_cli.comparison.result import CompareRow, WorstHead
from sphkv_cli.comparison.standings import duels_of, sentence, standings_at


def row(
    family: str, rate: float, error: float, *, is_centred: bool = True, spread: float = math.nan
) -> CompareRow:
    return CompareRow(
        family=family,
        setting=f"{family} {rate:g}",
        is_centred=is_centred,
        n_seeds=1,
        key_rate=rate,
        whole_rate=rate,
        laid_out_rate=rate,
        distortion=0.1,
        centred_distortion=0.1,
        value_distortion=0.1,
        logit_rms=0.1,
        logit_p99=0.2,
        attention_kl=0.1,
        key_output_error=error,
        whole_output_error=error,
        worst_head=WorstHead(1.0, 0, 0),
        seed_spread=spread,
    )


@pytest.mark.parametrize(
    ("rate", "how"), [(3.0, "measured"), (3.06, "measured"), (3.07, None), (2.93, None)]
)
def test_a_setting_counts_at_a_rate_within_two_percent_alone(rate: float, how: str | None) -> None:
    found = standings_at([row("rival", rate, 0.1)], 3.0, "keys")
    if how is None:
        assert not found.standings and found.absent == ("rival, centred",)
    else:
        assert found.standings[0].how == how and found.standings[0].rate == rate


def test_between_two_settings_the_logarithm_is_interpolated_and_marked() -> None:
    rows = [row("rival", 2.25, 0.1), row("rival", 4.25, 0.001), row("rival", 9.0, 1e-9)]
    (standing,) = standings_at(rows, 3.25, "keys").standings
    assert standing.how == "interpolated"
    assert standing.output_error == pytest.approx(0.01)  # half way between the logarithms


def test_nothing_is_extrapolated() -> None:
    found = standings_at([row("rival", 2.0, 0.1), row("rival", 2.5, 0.05)], 3.0, "keys")
    assert not found.standings


def test_a_side_that_stays_dense_does_not_take_part() -> None:
    keys_only = row("rival", 3.0, 0.1)
    keys_only = CompareRow(**{**vars(keys_only), "whole_output_error": math.nan})
    assert standings_at([keys_only], 3.0, "keys").standings
    assert not standings_at([keys_only], 3.0, "keys and values").standings


@pytest.mark.parametrize(
    ("polar", "rival", "spread", "says"),
    [
        (0.10, 0.15, 0.01, "polar wins, the best rival has 50% more"),
        (0.15, 0.10, 0.01, "polar loses, it has 50% more"),
        (0.102, 0.10, 0.01, "a tie"),
        (0.12, 0.10, 0.25, "a tie"),
    ],
)
def test_the_sentence_says_who_wins(polar: float, rival: float, spread: float, says: str) -> None:
    rows = [row(POLAR, 3.0, polar, spread=spread), row("rival", 3.0, rival, spread=spread)]
    assert says in sentence(standings_at(rows, 3.0, "keys"))


def test_a_duel_is_never_fought_with_more_bytes_or_far_fewer() -> None:
    rows = [
        row(POLAR, 3.26, 0.01),
        row(POLAR, 3.25, 0.02),
        row(POLAR, 3.25, 0.015, is_centred=False),
        row("rival", 3.25, 0.03),
        row("rival", 5.0, 0.03),  # 3.26 is far fewer than 5
    ]
    (duel,) = duels_of(rows, "keys")
    assert (duel.polar_rate, duel.polar_error, duel.polar_is_centred) == (3.25, 0.015, False)
    assert duel.ratio == pytest.approx(2.0) and duel.is_level


def test_a_duel_with_fewer_bytes_is_marked() -> None:
    (duel,) = duels_of([row(POLAR, 0.875, 0.5), row("rival", 0.9, 0.3)], "keys")
    assert not duel.is_level
    assert not duels_of([row(POLAR, 0.8, 0.5), row("rival", 0.9, 0.3)], "keys")
