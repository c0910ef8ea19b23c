"""What a probe found, as plain rows."""

from dataclasses import dataclass

from sphkv_cli.evaluation.copy_back import RecallScore
from sphkv_cli.evaluation.needle import NeedleGrid
from sphkv_cli.evaluation.result import GateOutcome


@dataclass(frozen=True)
class ProbeRow:
    """One coding; grid: of a needle, else None; is_ours: gates hold for it."""

    name: str
    is_ours: bool
    score: RecallScore
    grid: NeedleGrid | None


@dataclass(frozen=True)
class ProbeResult:
    """The report; rows end with the dense control.

    filler: where the text around the codes is from; is_usable: whether the dense model itself
    answers (`copy_back.LEAST_DENSE_ACCURACY`).
    """

    path: str
    digest: str
    model: str
    kind: str
    protocol_description: str
    filler: str
    lengths: tuple[int, ...]
    n_prompts: int
    n_codes: int
    n_digits: int
    is_usable: bool
    rows: tuple[ProbeRow, ...]
    gates: tuple[GateOutcome, ...]
    reading: tuple[str, ...]
    seconds: float
