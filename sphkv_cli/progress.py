"""The one way for a stage to say how far it is: a protocol, so that stages know no terminal."""

from typing import Protocol


class Progress(Protocol):
    """A sink for progress; one description at a time."""

    def start(self, description: str, total: float | None, unit: str) -> None:
        """Begin a phase of `total` units (None when unknown)."""

    def advance(self, amount: float = 1.0) -> None:
        """Report `amount` further units of the phase as done."""

    def finish(self) -> None:
        """End the phase."""


class NullProgress:
    """Progress that nobody watches."""

    def start(self, description: str, total: float | None, unit: str) -> None:
        """Do nothing."""

    def advance(self, amount: float = 1.0) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""
