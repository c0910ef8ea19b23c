"""One sentence for one mistake: a negative seed reads the same whatever the command."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sphkv_cli.allocation.options import AllocateOptions
from sphkv_cli.capture.options import CaptureOptions, SyntheticOptions, TextSource
from sphkv_cli.errors import UsageError
from sphkv_cli.evaluation.options import EvaluateOptions
from sphkv_cli.evaluation.probe_options import ProbeOptions
from sphkv_cli.fit.options import FitOptions
from sphkv_cli.option_checks import require_at_least, require_fraction, require_positive
from sphkv_cli.profile.options import Gates, ProfileOptions
from sphkv_cli.profile.synthetic import SyntheticSpeedOptions
from sphkv_cli.study.inputs import StudyOptions


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: CaptureOptions("smollm2", (TextSource(Path("a")),), seed=seed),
        lambda seed: SyntheticOptions(seed=seed),
        lambda seed: FitOptions(seed=seed),
        lambda seed: AllocateOptions(seed=seed),
        lambda seed: ProfileOptions(seed=seed),
        lambda seed: SyntheticSpeedOptions("8x8x64x4", seed=seed),
        lambda seed: EvaluateOptions(seed=seed),
        lambda seed: StudyOptions(seed=seed),
    ],
)
def test_every_command_refuses_a_negative_seed_in_the_same_words(
    make: Callable[[int], object],
) -> None:
    with pytest.raises(UsageError, match=r"^--seed is -1; give 0 or more$"):
        make(-1)
    make(0)


def test_what_is_left_out_is_not_too_small() -> None:
    require_at_least("--max-layers", None, 1)
    require_at_least("--max-layers", 1, 1)
    with pytest.raises(UsageError, match="--max-layers is 0; give 1 or more"):
        require_at_least("--max-layers", 0, 1)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_gate_that_holds_for_nothing_or_everything_is_refused(value: float) -> None:
    for make in (
        lambda: EvaluateOptions(gate_kl=value),
        lambda: EvaluateOptions(gate_perplexity=value),
        lambda: Gates(max_kl=value),
    ):
        with pytest.raises(UsageError, match=f"is {value}; give a number above 0"):
            make()
    require_positive("--gate-kl", 1e-9)
    require_positive("--gate-kl", None)


@pytest.mark.parametrize("value", [0.0, -1.0, 1.1, 2.0, float("nan"), float("inf")])
def test_a_least_share_is_above_0_and_at_most_1(value: float) -> None:
    for make, option in (
        (lambda: EvaluateOptions(gate_top1=value), "--gate-top1"),
        (lambda: ProbeOptions("needle", gate=value), "--gate-recall"),
    ):
        with pytest.raises(UsageError, match=f"{option} is {value}; give a fraction above 0, at"):
            make()
    require_fraction("--gate-top1", 1.0)
    require_fraction("--gate-top1", None)
