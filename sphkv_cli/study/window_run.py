"""The allocation that studies of pages fit: scored by the window, drops at a constant price.

Pages are cut from any order alike, and this one needs no fit of its own.
"""

from sphkv_cli.allocation.options import AllocateOptions
from sphkv_cli.allocation.stage import AllocationRun
from sphkv_cli.study.inputs import StudyInputs


def window_run(inputs: StudyInputs) -> AllocationRun:
    """Prepared at the middle budget.

    Raises:
        UsageError: no capture or codebooks, or a budget that cannot be laid out.
    """
    options = AllocateOptions(
        budget=inputs.options.middle_budget,
        utility="window",
        drop_coefficient=8.0,
        horizon=inputs.options.horizon,
        window=inputs.options.window,
        seed=inputs.seed,
    )
    return AllocationRun.prepare(
        options, inputs.require_capture(), inputs.require_codebooks(), inputs.progress
    )
