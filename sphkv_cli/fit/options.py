"""What `fit-codebooks` can be asked for."""

from dataclasses import dataclass
from typing import Literal, get_args

from sphkv_cli.errors import UsageError

RotationKind = Literal["hadamard", "haar", "none"]
Centring = Literal["none", "post_rope"]
Density = Literal["analytic", "empirical"]


@dataclass(frozen=True)
class FitOptions:
    """Options of one fit.

    codes: specifications (`code_spec`); empty for the candidates of the head_dim at hand.
    tiers: pairs ``KEY_CODE/VALUE_CODE`` of their names; empty to pair each code with itself.
    rotation, seed: the frame's; one rotation for all layers and heads.
    centring: of the keys.
    density: `empirical` also fits books per layer, KV head and level, and says whether they help.
    page_sizes: tokens per page for which the laid-out rate is given.
    """

    codes: tuple[str, ...] = ()
    tiers: tuple[str, ...] = ()
    rotation: RotationKind = "hadamard"
    centring: Centring = "post_rope"
    density: Density = "analytic"
    seed: int = 42
    page_sizes: tuple[int, ...] = (16, 32, 64)

    def __post_init__(self) -> None:
        _one_of("rotation", self.rotation, get_args(RotationKind))
        _one_of("centring", self.centring, get_args(Centring))
        _one_of("density", self.density, get_args(Density))
        if self.seed < 0:
            raise UsageError(f"the seed is {self.seed}", "give --seed 0 or more")
        if not self.page_sizes or any(size not in (16, 32, 64) for size in self.page_sizes):
            raise UsageError(f"the page sizes are {self.page_sizes}", "choose among 16, 32, 64")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} is {value!r}", f"choose one of {', '.join(allowed)}")
