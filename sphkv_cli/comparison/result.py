"""What `compare` reports: a row per setting, standings per asked rate, duels at equal bytes."""

from dataclasses import dataclass
from typing import Literal

from sphkv_cli.blocks import Table
from sphkv_cli.plots.figures import Figure

Side = Literal["keys", "keys and values"]
How = Literal["measured", "interpolated"]


@dataclass(frozen=True)
class WorstHead:
    """The largest relative output error of a query head, and where."""

    value: float
    layer: int
    head: int


@dataclass(frozen=True)
class CompareRow:
    """One setting of one family, mean over its seeds.

    key_rate: bits per key coordinate over whole groups, everything per token included; whole_rate:
    mean of keys and values, NaN where values stay dense; laid_out_rate: of the keys of one judge
    document, with tails, tables and means; seed_spread: standard deviation over seeds of the key
    output error over its mean, NaN for one seed.
    """

    family: str
    setting: str
    is_centred: bool
    n_seeds: int
    key_rate: float
    whole_rate: float
    laid_out_rate: float
    distortion: float
    centred_distortion: float
    value_distortion: float
    logit_rms: float
    logit_p99: float
    attention_kl: float
    key_output_error: float
    whole_output_error: float
    worst_head: WorstHead
    seed_spread: float

    @property
    def is_polar(self) -> bool:
        """Whether it is one of ours."""
        return self.family.startswith("polar")

    @property
    def label(self) -> str:
        """The family, and whether it is centred."""
        return f"{self.family}, {'centred' if self.is_centred else 'uncentred'}"

    def rate_of(self, side: Side) -> float:
        """The rate that counts for this side."""
        return self.key_rate if side == "keys" else self.whole_rate

    def error_of(self, side: Side) -> float:
        """The output error of this side."""
        return self.key_output_error if side == "keys" else self.whole_output_error


@dataclass(frozen=True)
class Standing:
    """A family at an asked rate; rate: of the setting that was measured, or the asked one."""

    label: str
    is_polar: bool
    how: How
    rate: float
    output_error: float
    spread: float


@dataclass(frozen=True)
class RateStandings:
    """All families at one rate, best first; absent: those without a setting around this rate."""

    rate: float
    side: Side
    standings: tuple[Standing, ...]
    absent: tuple[str, ...]


@dataclass(frozen=True)
class Duel:
    """A rival's own setting against the polar code of at most its bytes: the better of centred
    and uncentred on both sides, `*_is_centred` says which."""

    rival: str
    setting: str
    side: Side
    rival_rate: float
    polar_rate: float
    rival_error: float
    polar_error: float
    rival_is_centred: bool
    polar_is_centred: bool

    @property
    def ratio(self) -> float:
        """The rival's output error over polar's: above 1 polar is better."""
        return self.rival_error / self.polar_error

    @property
    def is_level(self) -> bool:
        """Whether polar has 98 % of the rival's bytes or more."""
        return self.polar_rate >= 0.98 * self.rival_rate


@dataclass(frozen=True)
class Comparison:
    """The whole comparison; digest is None where nothing was written."""

    model: str
    documents: tuple[str, ...]
    n_tokens: int
    n_queries: int
    n_layers: int
    frame: str
    rows: tuple[CompareRow, ...]
    standings: tuple[RateStandings, ...]
    duels: tuple[Duel, ...]
    tables: tuple[Table, ...]
    figure: Figure
    reading: tuple[str, ...]
    conditions: tuple[str, ...]
    elapsed_s: float
    output: str | None = None
    digest: str | None = None
