"""The tables of the designer: D(R) by the formula, and the measured pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

from sphkv_cli.artifacts.fit_tables import DesignRow
from sphkv_cli.fit.code_spec import spec_text
from sphkv_cli.fit.design_codes import native_designs
from sphkv_codebooks.search import CodeDesign, SearchSpace, best_codes, gaussian_limit


@dataclass(frozen=True)
class FrontierRow:
    """The analytically best codes of at most one rate; None where there is none.

    limit: 4^-rate; best: any number of cells; whole_bits: powers of two; native: what the CUDA
    kernel reads.
    """

    rate: float
    limit: float
    best: CodeDesign | None
    whole_bits: CodeDesign | None
    native: CodeDesign | None

    @staticmethod
    def spec(design: CodeDesign | None) -> str:
        """As --code takes it."""
        return "-" if design is None else spec_text(design.n_cells, design.radius)


@dataclass(frozen=True)
class DesignTables:
    """What the designer prints.

    frontier: D(R) around the rates; rows: every measured pair, by the rate asked for, then those
    that lose a head last, then by error; protocol: what stays dense, in words.
    """

    frontier: tuple[FrontierRow, ...]
    rows: tuple[DesignRow, ...]
    protocol: str

    def of_rate(self, rate: float) -> tuple[DesignRow, ...]:
        """The rows of one rate, best first."""
        return tuple(row for row in self.rows if row.target_rate == rate)

    @property
    def rates(self) -> tuple[float, ...]:
        """The rates asked for."""
        return tuple(dict.fromkeys(row.target_rate for row in self.rows))


def frontier_rows(head_dim: int, rates: Sequence[float]) -> tuple[FrontierRow, ...]:
    """At the rates asked for, and half a bit around a single one."""
    if len(rates) == 1:
        rates = [rates[0] + step for step in (-0.5, -0.25, 0.0, 0.25, 0.5)]
    any_cells = SearchSpace(head_dim)
    whole = SearchSpace(head_dim, cells="powers_of_two")
    return tuple(
        FrontierRow(
            rate=rate,
            limit=gaussian_limit(rate),
            best=_first(best_codes(any_cells, rate, 1)),
            whole_bits=_first(best_codes(whole, rate, 1)),
            native=_first(native_designs(head_dim, rate)),
        )
        for rate in sorted(rates)
        if rate > 0
    )


def _first(designs: Sequence[CodeDesign]) -> CodeDesign | None:
    return designs[0] if designs else None
