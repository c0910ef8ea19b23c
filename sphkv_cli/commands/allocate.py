"""`sphkv allocate`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sphkv_cli.commands.registry import CaptureArgument, ForceFlag, JsonFlag, Seed, command
from sphkv_cli.errors import UsageError


@command("allocate")
def allocate_command(
    capture: CaptureArgument,
    codebooks: Annotated[Path, typer.Argument(help="The codebooks: codebooks.h5.")],
    budget: Annotated[
        str,
        typer.Option(
            help="Of one context: bits per coordinate (3b), bytes (12MiB) or a fraction (20%)."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The allocation to write.")] = Path("allocation.h5"),
    page_size: Annotated[int, typer.Option(help="Tokens per page: 16, 32 or 64.")] = 32,
    horizon: Annotated[
        int, typer.Option(help="Last tokens of a document: not cached, their queries judge.")
    ] = 128,
    window: Annotated[
        int, typer.Option(help="Last positions of the context whose queries score its tokens.")
    ] = 64,
    utility: Annotated[
        str,
        typer.Option(
            help="What scores a token: combination (of all others), window, calibration-queries, "
            "expected-attention, accumulated, recency ...; oracle sees the future: a ceiling."
        ),
    ] = "combination",
    calibrate: Annotated[
        bool, typer.Option(help="Turn scores into expected damage on the fit documents.")
    ] = True,
    drop_coefficient: Annotated[
        str,
        typer.Option(
            help="How much more a set of drops hurts than its sum: a number, or auto to fit it."
        ),
    ] = "auto",
    code_coefficient: Annotated[
        str,
        typer.Option(
            help="How much more coded tokens hurt than first order says: a number, or auto."
        ),
    ] = "auto",
    head_weights: Annotated[
        Literal["auto", "fisher", "output", "none"],
        typer.Option(
            help="Weigh query heads by what the next token minds (capture --fisher), by their "
            "output projection, or not; auto takes the first that the capture holds."
        ),
    ] = "auto",
    tier: Annotated[
        list[str] | None, typer.Option(help="Choose only among these tiers, repeatable.")
    ] = None,
    plan_select: Annotated[
        bool, typer.Option("--plan-select", help="Plan the select documents too.")
    ] = False,
    pin_first: Annotated[
        int, typer.Option(help="First tokens that stay in the largest tier; 0: they compete.")
    ] = 0,
    pin_last: Annotated[
        int, typer.Option(help="Last tokens of the context that stay in the largest tier.")
    ] = 0,
    no_drop: Annotated[
        bool, typer.Option("--no-drop", help="Drop no token: only choose its tier.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw bytes by head, both ends and tiers to this .png or .svg."),
    ] = None,
    seed: Seed = 42,
    force: ForceFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """Choose keep, drop and tier of every page of tokens under one byte budget."""
    from sphkv_cli.allocation.figure import discovery_figure
    from sphkv_cli.allocation.options import AllocateOptions
    from sphkv_cli.allocation.stage import allocate
    from sphkv_cli.allocation.view import view
    from sphkv_cli.artifacts.store import check_outputs
    from sphkv_cli.plots.draw import require_drawable, write_figure
    from sphkv_cli.render import Output, TerminalProgress

    options = AllocateOptions(
        budget=budget,
        page_size=page_size,
        horizon=horizon,
        window=window,
        utility=utility,
        calibrate=calibrate,
        drop_coefficient=_coefficient("--drop-coefficient", drop_coefficient),
        code_coefficient=_coefficient("--code-coefficient", code_coefficient),
        head_weights=head_weights,
        tiers=tuple(tier or ()),
        plan_select=plan_select,
        pin_first=pin_first,
        pin_last=pin_last,
        no_drop=no_drop,
        seed=seed,
    )
    check_outputs(
        {"--output": output, "--plot": plot},
        {"CAPTURE": capture, "CODEBOOKS": codebooks},
        force=force,
    )
    require_drawable(plot)
    with TerminalProgress() as progress:
        result = allocate(options, capture, codebooks, output, progress=progress, force=force)
    if plot is not None:
        write_figure(discovery_figure(result.summary), plot)
    Output(json_output).show(result, view(result))


def _coefficient(option: str, text: str) -> float | None:
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(
            f"{option} {text!r} is no number", "give auto, or a number above 0"
        ) from error
