"""What `allocate` can be asked for."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from sphkv_cli.allocation.budget import Budget
from sphkv_cli.allocation.estimators import estimator_of
from sphkv_cli.errors import UsageError

HeadWeights = Literal["output", "none"]
PAGE_SIZES = (16, 32, 64)

DEFAULT_DROP_COEFFICIENT = 8.0
DROP_COEFFICIENT_SOURCE = (
    "default; on SmolLM2-135M 4 to 16 is flat and halves the KL of a coefficient of 1"
)
HEAD_WEIGHT_SOURCES = {
    "output": "squared Frobenius norm of each query head's output projection over head_dim",
    "none": "1 for every query head",
}


@dataclass(frozen=True)
class AllocateOptions:
    """Options of one allocation.

    budget: of one context, as `budget.Budget` reads it.
    page_size: tokens per page; horizon: tokens after the context of every document; window:
    positions at the end of the context whose queries are looked at.
    utility: name of the estimator (window, recency, oracle).
    calibrate: turn scores into expected future damage on the fit documents; without it the
        window's own damage is believed as it is (a control, visibly worse).
    drop_coefficient: c_drop, how much more a set of drops hurts than its sum.
    head_weights: F of each query head: its output projection's weight, or 1 (a control).
    tiers: names to choose among; empty for all of the codebooks, int8 and dense.
    plan_select: plan the select documents too, not only the judge ones.
    seed: recorded; nothing here is random.
    """

    budget: str = "3b"
    page_size: int = 32
    horizon: int = 128
    window: int = 64
    utility: str = "window"
    calibrate: bool = True
    drop_coefficient: float = DEFAULT_DROP_COEFFICIENT
    head_weights: HeadWeights = "output"
    tiers: tuple[str, ...] = ()
    plan_select: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        Budget.parse(self.budget)
        estimator_of(self.utility)
        if self.page_size not in PAGE_SIZES:
            raise UsageError(f"the page size is {self.page_size}", "choose one of 16, 32, 64")
        if self.horizon < 1:
            raise UsageError(f"the horizon is {self.horizon} tokens", "give --horizon 1 or more")
        if self.window < 1:
            raise UsageError(f"the window is {self.window} tokens", "give --window 1 or more")
        if not (math.isfinite(self.drop_coefficient) and self.drop_coefficient > 0):
            raise UsageError(
                f"the drop coefficient is {self.drop_coefficient}",
                "give --drop-coefficient above 0 (8 by default)",
            )
        if self.head_weights not in get_args(HeadWeights):
            raise UsageError(
                f"head weights {self.head_weights!r} are not known", "choose output or none"
            )
        if not self.calibrate and self.utility == "recency":
            raise UsageError(
                "recency knows no damage, only an order", "leave calibration on, or use the window"
            )
        if self.seed < 0:
            raise UsageError(f"the seed is {self.seed}", "give --seed 0 or more")
