"""The checks that options of several commands share, worded once."""

import math
from collections.abc import Mapping

from sphkv_cli.errors import UsageError


def require_at_least(option: str, value: int | None, least: int) -> None:
    """Refuse a number below `least`; None passes.  option: as typed, for example "--seed"."""
    if value is not None and value < least:
        raise UsageError(f"{option} is {value}", f"give {least} or more")


def require_positive(option: str, value: float | None) -> None:
    """Refuse a limit of 0 or less, NaN or infinity; None passes."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise UsageError(f"{option} is {value}", "give a number above 0")


def require_fraction(option: str, value: float | None) -> None:
    """Refuse a least share that always holds (0) or never does (above 1, NaN); None passes."""
    if value is not None and not 0 < value <= 1:
        raise UsageError(f"{option} is {value}", "give a fraction above 0, at most 1")


def refuse_given(where: str, is_given: Mapping[str, bool]) -> None:
    """Refuse options of another mode than the one asked for, rather than ignore them.

    where: for example "with --synthetic"; is_given: by option, as typed.
    """
    for option, given in is_given.items():
        if given:
            raise UsageError(f"{option} has no meaning {where}", "leave it out")
