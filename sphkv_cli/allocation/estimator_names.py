"""Names of the estimators of utility, for options that load nothing heavy."""

from sphkv_cli.errors import UsageError

COMBINATION = "combination"
ORACLE = "oracle"
SIGNAL_NAMES = (
    *("window", "half-window", "window-attention", "window-pooled", "half-window-pooled"),
    *("accumulated", "normalised", "calibration-queries", "expected-attention"),
    *("key-norm", "value-norm", "recency"),
)
"""The signals of signals.py, in the order in which a combination weighs them."""
UTILITIES = (COMBINATION, *SIGNAL_NAMES, ORACLE)


def require_utility(name: str) -> None:
    """Refuse an unknown name; raises UsageError with the known ones."""
    if name not in UTILITIES:
        known = ", ".join(UTILITIES)
        raise UsageError(f"utility {name!r} is not known", f"choose one of {known}")
