"""What `allocate` can be asked for."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from sphkv_cli.allocation.budget import Budget
from sphkv_cli.allocation.estimator_names import COMBINATION, require_utility
from sphkv_cli.allocation.pins import Pins
from sphkv_cli.errors import UsageError
from sphkv_cli.option_checks import require_at_least

HeadWeights = Literal["auto", "fisher", "output", "none"]
PAGE_SIZES = (16, 32, 64)


@dataclass(frozen=True)
class AllocateOptions:
    """Options of one allocation.

    budget: of one context, as `budget.Budget` reads it.
    page_size: tokens per page; horizon: tokens after the context of every document; window:
    positions at the end of the context whose queries are looked at.
    utility: name of the estimator (estimators.py).
    calibrate: turn scores into expected future damage on the fit documents; without it the
        window's own damage is believed as it is (a control, visibly worse).
    drop_coefficient: c_drop, how much more a set of drops hurts than its sum; None fits it per
        layer and KV head on the fit documents.
    code_coefficient: c_code, the same of coded tokens; None fits it, 1 is plain first order.
    head_weights: F of each query head: the captured Fisher weight, its output projection's weight,
        or 1 (a control); auto is the first of them that the capture holds.
    tiers: names to choose among; empty for all of the codebooks, int8 and dense.
    plan_select: plan the select documents too, not only the judge ones.
    pin_first, pin_last, no_drop: what is kept whatever it scores, as `Pins` has it.
    seed: recorded; nothing here is random.
    """

    budget: str = "3b"
    page_size: int = 32
    horizon: int = 128
    window: int = 64
    utility: str = COMBINATION
    calibrate: bool = True
    drop_coefficient: float | None = None
    code_coefficient: float | None = None
    head_weights: HeadWeights = "auto"
    tiers: tuple[str, ...] = ()
    plan_select: bool = False
    pin_first: int = 0
    pin_last: int = 0
    no_drop: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        Budget.parse(self.budget)
        _ = self.pins
        require_utility(self.utility)
        if self.page_size not in PAGE_SIZES:
            raise UsageError(f"the page size is {self.page_size}", "choose one of 16, 32, 64")
        require_at_least("--horizon", self.horizon, 1)
        require_at_least("--window", self.window, 1)
        for kind in ("drop", "code"):
            given = getattr(self, f"{kind}_coefficient")
            if given is not None and not (math.isfinite(given) and given > 0):
                raise UsageError(
                    f"the {kind} coefficient is {given}",
                    f"give --{kind}-coefficient above 0, or auto",
                )
        if self.head_weights not in get_args(HeadWeights):
            raise UsageError(
                f"head weights {self.head_weights!r} are not known",
                "choose auto, fisher, output or none",
            )
        if not self.calibrate and self.utility not in ("window", "oracle"):
            raise UsageError(
                f"the score {self.utility!r} is no damage, only an order",
                "leave calibration on, or use --utility window",
            )
        require_at_least("--seed", self.seed, 0)

    @property
    def pins(self) -> Pins:
        """As one."""
        return Pins(self.pin_first, self.pin_last, self.no_drop)

    @property
    def is_fitted(self) -> bool:
        """Whether a coefficient is fitted on the fit documents."""
        return self.drop_coefficient is None or self.code_coefficient is None
