"""A byte budget in the three forms people think in, and what each means for one context.

    bytes = fraction * dense_bytes = bits_per_coordinate * n_coordinates / 8
    dense_bytes = 2 n_coordinates,  n_coordinates = 2 n_layers n_kv_heads head_dim n_context

A budget is for one context (one cached sequence) and pays for everything laid out for it: codes,
padding, page table, positions, fixed tables.  "0.2x" and "20%" are fractions of the bf16 cache.
"""

import re
from dataclasses import dataclass
from typing import Literal

from sphkv_cli.errors import UsageError

BudgetUnit = Literal["bytes", "bits_per_coordinate", "fraction"]

_FORMS = 'write it as bytes ("12MiB"), bits per coordinate ("3b") or a fraction ("0.2x", "20%")'
_UNITS: dict[str, tuple[BudgetUnit, float]] = {
    "b": ("bits_per_coordinate", 1.0),
    "bit": ("bits_per_coordinate", 1.0),
    "bits": ("bits_per_coordinate", 1.0),
    "x": ("fraction", 1.0),
    "%": ("fraction", 0.01),
    "B": ("bytes", 1.0),
    "kB": ("bytes", 1e3),
    "KB": ("bytes", 1e3),
    "MB": ("bytes", 1e6),
    "GB": ("bytes", 1e9),
    "KiB": ("bytes", 2.0**10),
    "MiB": ("bytes", 2.0**20),
    "GiB": ("bytes", 2.0**30),
}
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z%]*)")


@dataclass(frozen=True)
class Budget:
    """A budget as the user gave it: `amount` bytes, bits per coordinate or fraction."""

    amount: float
    unit: BudgetUnit
    text: str

    @staticmethod
    def parse(text: str) -> "Budget":
        """Read "12MiB", "3b", "3 bits", "0.2x" or "20%".

        Raises:
            UsageError: unparsable, without a unit, negative, zero or not finite.
        """
        match = _NUMBER.fullmatch(text.strip())
        if match is None:
            raise UsageError(f"budget {text!r} cannot be read", _FORMS)
        number, unit = match.groups()
        if not unit:
            raise UsageError(f"budget {text!r} has no unit", _FORMS)
        if unit not in _UNITS:
            raise UsageError(f"budget {text!r} has the unknown unit {unit!r}", _FORMS)
        kind, scale = _UNITS[unit]
        amount = float(number) * scale
        if amount < 0:
            raise UsageError(f"budget {text!r} is negative", "give a positive one")
        if amount == 0 or amount == float("inf"):
            raise UsageError(f"budget {text!r} must be positive and finite", _FORMS)
        return Budget(amount, kind, text.strip())

    def resolve(self, n_coordinates: int) -> "ResolvedBudget":
        """The budget of one context of `n_coordinates` key and value coordinates."""
        if self.unit == "bytes":
            n_bytes = self.amount
        elif self.unit == "fraction":
            n_bytes = self.amount * 2 * n_coordinates
        else:
            n_bytes = self.amount * n_coordinates / 8
        return ResolvedBudget(int(n_bytes), n_coordinates)


@dataclass(frozen=True)
class ResolvedBudget:
    """Bytes of one context, and the same as bits per coordinate and as fraction of bf16."""

    n_bytes: int
    n_coordinates: int

    @property
    def bits_per_coordinate(self) -> float:
        return 8 * self.n_bytes / self.n_coordinates

    @property
    def fraction(self) -> float:
        return self.n_bytes / (2 * self.n_coordinates)

    def describe(self) -> str:
        """All three forms in one line."""
        return (
            f"{self.n_bytes:,} bytes = {self.bits_per_coordinate:.4g} bits per coordinate = "
            f"{100 * self.fraction:.4g} % of bf16"
        )

    def check(self, *, minimum_bytes: int, dense_bytes: int, document: str) -> None:
        """Refuse a budget outside what can be laid out for a document.

        Args:
            minimum_bytes: what is laid out when every token is dropped (the metadata).
            dense_bytes: what is laid out when every token is dense.
            document: its name, for the message.

        Raises:
            UsageError: below the first or above the second.
        """
        if self.n_bytes < minimum_bytes:
            raise UsageError(
                f"budget {self.describe()} of {document} is below its metadata, "
                f"{minimum_bytes:,} bytes with every token dropped",
                f"give at least {least_budget(minimum_bytes, self.n_coordinates)}",
            )
        if self.n_bytes > dense_bytes:
            raise UsageError(
                f"budget {self.describe()} of {document} is above its dense cache, "
                f"{dense_bytes:,} bytes laid out in pages",
                f"give at most {most_budget(dense_bytes, self.n_coordinates)}, or keep bf16",
            )


def least_budget(n_bytes: int, n_coordinates: int) -> str:
    """ "2.271b": `n_bytes` in bits per coordinate, rounded up: a budget that pays for them."""
    count = -(-8000 * n_bytes // n_coordinates)
    text = f"{_thousandths(count)}b"
    # Where they are a whole number of thousandths, the binary fraction can lie below it.
    is_short = Budget.parse(text).resolve(n_coordinates).n_bytes < n_bytes
    return f"{_thousandths(count + 1)}b" if is_short else text


def most_budget(n_bytes: int, n_coordinates: int) -> str:
    """ "2.27b": `n_bytes` in bits per coordinate, rounded down: a budget that takes no more."""
    return f"{_thousandths(8000 * n_bytes // n_coordinates)}b"


def _thousandths(count: int) -> str:
    return f"{count / 1000:.12g}"
