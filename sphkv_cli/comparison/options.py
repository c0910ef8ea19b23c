"""What `compare` can be asked for."""

import math
from dataclasses import dataclass

from sphkv_cli.errors import UsageError

METHODS = (
    *("turboquant-mse", "turboquant-prod", "qjl", "eden", "kivi", "kmeans", "wu"),
    *("integer", "fp8"),
)
"""Families of rivals, by the names that --method takes; the polar codes always take part."""


@dataclass(frozen=True)
class CompareOptions:
    """Options of one comparison.

    rates: bits per coordinate at which a winner is named; methods: families, empty for all;
    seeds: rotations (and projections) per rotated method, from `seed` on; window, first_tokens:
    dense, as the uniform protocol has it; max_documents: judge documents, the first ones;
    max_queries: per document and layer; max_layers: evenly spaced, None for all.
    """

    rates: tuple[float, ...] = (2.0, 3.0, 4.0)
    methods: tuple[str, ...] = ()
    seeds: int = 3
    window: int = 32
    first_tokens: int = 4
    max_documents: int = 4
    max_queries: int = 64
    max_layers: int | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        if not self.rates or any(not math.isfinite(r) or not 0.5 <= r <= 8.0 for r in self.rates):
            raise UsageError(
                f"the rates are {', '.join(f'{r:g}' for r in self.rates)}",
                "give --rates between 0.5 and 8 bits per coordinate, as 2,3,4",
            )
        if len(set(self.rates)) < len(self.rates):
            raise UsageError("a rate is named twice", "name each once")
        for name in self.methods:
            if name not in METHODS:
                raise UsageError(
                    f"no method is called {name!r}", f"choose among {', '.join(METHODS)}"
                )
        for name in ("seeds", "max_documents", "max_queries", "max_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}", "give 1 or more")
        for name in ("window", "first_tokens", "seed"):
            if getattr(self, name) < 0:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} is {getattr(self, name)}", "give 0 or more")

    @property
    def families(self) -> tuple[str, ...]:
        """The rivals that take part, in the order of METHODS."""
        return tuple(name for name in METHODS if not self.methods or name in self.methods)


def parse_rates(text: str) -> tuple[float, ...]:
    """ "2,3,4" -> (2.0, 3.0, 4.0); raises UsageError."""
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise UsageError(f"--rates is {text!r}", "write numbers as 2,3,4") from error
