"""Who is best at a rate: only settings of that rate are compared, or values between two settings.

A setting counts as measured at an asked rate R when its own rate is within 2 % of it.  Otherwise
the error is interpolated, log error over rate, between the family's two settings around R; a
family without settings on both sides is absent.  Differences within 3 %, or within the spread over
rotation seeds where that is larger, are called a tie.  Source: ours.
"""

import math
from collections.abc import Sequence

from sphkv_cli.comparison.candidates import POLAR
from sphkv_cli.comparison.result import CompareRow, Duel, How, RateStandings, Side, Standing

TOLERANCE = 0.02
TIE = 0.03
FEWEST = 0.9
"""A polar code below this share of a rival's bytes would lose by its bytes, not by its kind."""


def standings_at(rows: Sequence[CompareRow], rate: float, side: Side) -> RateStandings:
    """Every family, centred and not, at one asked rate."""
    ladders: dict[str, list[CompareRow]] = {}
    for row in rows:
        if math.isfinite(row.error_of(side)):
            ladders.setdefault(row.label, []).append(row)
    found, absent = [], []
    for label, ladder in ladders.items():
        standing = _standing(label, ladder, rate, side)
        if standing is None:
            absent.append(label)
        else:
            found.append(standing)
    found.sort(key=lambda standing: standing.output_error)
    return RateStandings(rate, side, tuple(found), tuple(sorted(absent)))


def _standing(label: str, ladder: Sequence[CompareRow], rate: float, side: Side) -> Standing | None:
    def standing(how: How, at: float, error: float, spread: float) -> Standing:
        return Standing(label, ladder[0].is_polar, how, at, error, spread)

    nearest = min(ladder, key=lambda row: abs(row.rate_of(side) - rate))
    if abs(nearest.rate_of(side) - rate) <= TOLERANCE * rate + 1e-9:
        return standing(
            "measured", nearest.rate_of(side), nearest.error_of(side), nearest.seed_spread
        )
    below = [row for row in ladder if row.rate_of(side) < rate]
    above = [row for row in ladder if row.rate_of(side) > rate]
    if not below or not above:
        return None
    low = max(below, key=lambda row: row.rate_of(side))
    high = min(above, key=lambda row: row.rate_of(side))
    share = (rate - low.rate_of(side)) / (high.rate_of(side) - low.rate_of(side))
    logs = [math.log(max(row.error_of(side), 1e-300)) for row in (low, high)]
    error = math.exp(logs[0] + share * (logs[1] - logs[0]))
    spreads = [row.seed_spread for row in (low, high) if math.isfinite(row.seed_spread)]
    return standing("interpolated", rate, error, max(spreads, default=math.nan))


def is_tie(one: Standing, other: Standing) -> bool:
    """Whether two standings are too close to be told apart."""
    spreads = [s.spread for s in (one, other) if math.isfinite(s.spread)]
    apart = abs(math.log(one.output_error / other.output_error))
    return apart <= max(TIE, *spreads) if spreads else apart <= TIE


def sentence(standings: RateStandings) -> str:
    """Who wins at this rate, in one sentence."""
    at = f"At {standings.rate:g} bits, {standings.side} coded: "
    polar = [s for s in standings.standings if s.is_polar]
    rivals = [s for s in standings.standings if not s.is_polar]
    if not polar:
        return at + "no polar code has this rate."
    if not rivals:
        return at + "no rival has settings around this rate."
    ours, theirs = polar[0], rivals[0]
    pair = f"{_words(ours)} against {_words(theirs)}"
    if is_tie(ours, theirs):
        return f"{at}a tie within seed noise: {pair}."
    apart = abs(theirs.output_error / ours.output_error - 1.0)
    if ours.output_error < theirs.output_error:
        return f"{at}polar wins, the best rival has {apart:.0%} more output error: {pair}."
    more = ours.output_error / theirs.output_error - 1.0
    return f"{at}polar loses, it has {more:.0%} more output error: {pair}."


def _words(standing: Standing) -> str:
    how = "" if standing.how == "measured" else " (interpolated)"
    return f"{standing.label} {standing.output_error:.4g}{how}"


def duels_of(rows: Sequence[CompareRow], side: Side) -> tuple[Duel, ...]:
    """Every rival's own setting against the polar code of at most its bytes, by rate."""
    settings: dict[tuple[str, str], list[CompareRow]] = {}
    for row in rows:
        if not row.is_polar and math.isfinite(row.error_of(side)):
            settings.setdefault((row.family, row.setting), []).append(row)
    found = []
    for rival_rows in settings.values():
        rival = min(rival_rows, key=lambda row: row.error_of(side))
        rate = rival.rate_of(side)
        fitting = [
            row
            for row in rows
            if row.family == POLAR and FEWEST * rate <= row.rate_of(side) <= rate + 1e-9
        ]
        if not fitting:
            continue
        largest = max(row.rate_of(side) for row in fitting)
        ours = min(
            (row for row in fitting if row.rate_of(side) == largest),
            key=lambda row: row.error_of(side),
        )
        found.append(
            Duel(
                rival=rival.family,
                setting=rival.setting,
                side=side,
                rival_rate=rate,
                polar_rate=largest,
                rival_error=rival.error_of(side),
                polar_error=ours.error_of(side),
                rival_is_centred=rival.is_centred,
                polar_is_centred=ours.is_centred,
            )
        )
    return tuple(found)
