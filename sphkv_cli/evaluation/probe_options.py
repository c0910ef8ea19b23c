"""What `evaluate --probe` can be asked for beside what `evaluate` is asked."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from sphkv_cli.errors import UsageError

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
            if getattr(self, name) < 1:
                raise UsageError(f"--probe-{name} is {getattr(self, name)}", "give 1 or more")
        if not self.lengths or min(self.lengths) < 1:
            raise UsageError(f"--probe-length is {self.lengths}", "give 1 or more tokens")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise UsageError(f"--probe-depth is {self.depths}", "give fractions from 0 to 1")
        if self.gate is not None and not (math.isfinite(self.gate) and 0 < self.gate <= 1):
            raise UsageError(f"--gate-recall is {self.gate}", "give a fraction above 0, at most 1")
