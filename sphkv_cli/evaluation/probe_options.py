"""What `evaluate --probe` can be asked for beside what `evaluate` is asked."""

from dataclasses import dataclass
from typing import Literal, get_args

from sphkv_cli.errors import UsageError
from sphkv_cli.option_checks import require_at_least, require_fraction

ProbeKind = Literal["copy-back", "needle"]


@dataclass(frozen=True)
class ProbeOptions:
    """Options of one probe.

    kind: "copy-back" asks for all codes of a context, "needle" for one at each depth and length.
    lengths: tokens of the contexts (copy-back: of each, one table over all).
    depths: where the needle's statement lies, 0 at the start, 1 at the end.
    keys, values, digits: statements of a context, codes in each, digits of a code.
    prompts: of each length (copy-back), of each cell (needle).
    gate: least digit accuracy of every row of ours.
    """

    kind: ProbeKind
    lengths: tuple[int, ...] = (512,)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    keys: int = 4
    values: int = 1
    digits: int = 7
    prompts: int = 8
    gate: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(ProbeKind):
            raise UsageError(f"--probe {self.kind} is unknown", "choose copy-back or needle")
        for name in ("keys", "values", "digits", "prompts"):
            require_at_least(f"--probe-{name}", getattr(self, name), 1)
        for length in self.lengths:
            require_at_least("--probe-length", length, 1)
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise UsageError(f"--probe-depth is {depth:g}", "give a fraction from 0 to 1")
        require_fraction("--gate-recall", self.gate)
