"""The checks that options of several commands share, worded once."""

from sphkv_cli.errors import UsageError


def require_at_least(option: str, value: int | None, least: int) -> None:
    """Refuse a number below `least`; None passes.  option: as typed, for example "--seed"."""
    if value is not None and value < least:
        raise UsageError(f"{option} is {value}", f"give {least} or more")
