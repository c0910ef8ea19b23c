"""What `fit-codebooks` can be asked for."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from sphkv_cli.errors import UsageError
from sphkv_cli.option_checks import refuse_given, require_at_least

RotationKind = Literal["hadamard", "haar", "none"]
Centring = Literal["auto", "none", "post_rope", "pre_rope"]
Balancing = Literal["auto", "none", "key_query"]
Density = Literal["analytic", "empirical"]

MAX_TARGET_RATE = 8.0
MAX_SWEEP_RATES = 64


@dataclass(frozen=True)
class FitOptions:
    """Options of one fit.

    codes: specifications (`code_spec`); empty for the candidates of the head_dim at hand.
    tiers: pairs ``KEY_CODE/VALUE_CODE`` of their names; empty to pair each code with itself.
    rotation, seed: the frame's; one rotation for all layers and heads.
    centring: of the keys; "auto" measures which one each layer needs.
    balancing: of keys against queries; "auto" measures whether it pays, layer by layer.
    rope_pairs: RoPE pairs that a mean before RoPE keeps; "auto" measures how few will do.
    density: `empirical` also fits books per layer, KV head and level, and says whether they help.
    page_sizes: tokens per page for which the laid-out rate is given.
    target_rates: bits per coordinate at which the designer chooses codes; then no codes or tiers.
    native_only: the designer takes only codes that the CUDA kernel reads.
    """

    codes: tuple[str, ...] = ()
    tiers: tuple[str, ...] = ()
    rotation: RotationKind = "hadamard"
    centring: Centring = "auto"
    balancing: Balancing = "auto"
    rope_pairs: int | Literal["auto"] = "auto"
    density: Density = "analytic"
    seed: int = 42
    page_sizes: tuple[int, ...] = (16, 32, 64)
    target_rates: tuple[float, ...] = ()
    native_only: bool = False

    def __post_init__(self) -> None:
        _one_of("rotation", self.rotation, get_args(RotationKind))
        _one_of("centring", self.centring, get_args(Centring))
        _one_of("balancing", self.balancing, get_args(Balancing))
        if self.rope_pairs != "auto" and self.rope_pairs < 1:
            raise UsageError(f"--rope-pairs is {self.rope_pairs}", "give 1 or more, or auto")
        if self.centring in ("none", "post_rope"):
            refuse_given(
                f"with --centring {self.centring}", {"--rope-pairs": self.rope_pairs != "auto"}
            )
        _one_of("density", self.density, get_args(Density))
        require_at_least("--seed", self.seed, 0)
        if not self.page_sizes or any(size not in (16, 32, 64) for size in self.page_sizes):
            raise UsageError(f"the page sizes are {self.page_sizes}", "choose among 16, 32, 64")
        self._check_target_rates()

    def _check_target_rates(self) -> None:
        for rate in self.target_rates:
            if not 0.5 <= rate <= MAX_TARGET_RATE:
                raise UsageError(
                    f"the target rate is {rate:g} bits", f"choose 0.5 to {MAX_TARGET_RATE:g}"
                )
        if len(set(self.target_rates)) < len(self.target_rates):
            raise UsageError(f"a target rate is named twice in {self.target_rates}", "name it once")
        if self.target_rates and (self.codes or self.tiers):
            raise UsageError(
                "--target-rate chooses codes and tiers, --code and --tier name them",
                "leave one of them out",
            )
        if self.native_only and not self.target_rates:
            raise UsageError("--native-only restricts the designer", "give it a --target-rate")


def parse_sweep(text: str) -> tuple[float, ...]:
    """The rates of LOW:HIGH:STEP, both ends included.

    Raises:
        UsageError: not of that form, or more than 64 rates.
    """
    words = text.split(":")
    try:
        low, high, step = (float(word) for word in words)
    except ValueError:
        low, high, step = math.nan, math.nan, math.nan
    if not (math.isfinite(low + high) and 0 < low <= high and 0.01 <= step < math.inf):
        raise UsageError(
            f"the sweep {text!r} is not of the form LOW:HIGH:STEP", "write it as 2:4.5:0.25"
        )
    n_rates = int((high - low) / step + 1e-9) + 1
    if n_rates > MAX_SWEEP_RATES:
        raise UsageError(f"the sweep {text!r} has {n_rates} rates", "choose a larger step")
    return tuple(round(low + index * step, 6) for index in range(n_rates))


def parse_rope_pairs(text: str) -> int | Literal["auto"]:
    """A number, or "auto"; raises UsageError on anything else."""
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--rope-pairs is {text!r}", "give a number, or auto") from None


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} is {value!r}", f"choose one of {', '.join(allowed)}")
