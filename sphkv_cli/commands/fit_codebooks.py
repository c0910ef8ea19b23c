"""`sphkv fit-codebooks`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sphkv_cli.commands.registry import CaptureArgument, ForceFlag, JsonFlag, Seed, command


@command("fit-codebooks")
def fit_codebooks_command(
    capture: CaptureArgument,
    output: Annotated[Path, typer.Option(help="The codebooks to write.")] = Path("codebooks.h5"),
    code: Annotated[
        list[str] | None,
        typer.Option(
            help="A candidate, repeatable: BITS PER LEVEL:RADIUS, as 4/2/2/2:fp16 or "
            "n12/n5/n5/2:r2 (n: number of cells). Without it: the paper's code and better ones "
            "from 2 to 4 bits."
        ),
    ] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY_CODE/VALUE_CODE by name, repeatable: the tiers to allocate among. Without "
            "it every code serves keys and values alike."
        ),
    ] = None,
    rotation: Annotated[
        Literal["hadamard", "haar", "none"], typer.Option(help="Of keys, queries and values.")
    ] = "hadamard",
    centring: Annotated[
        Literal["post_rope", "none"], typer.Option(help="Which mean is taken from the keys.")
    ] = "post_rope",
    density: Annotated[
        Literal["analytic", "empirical"],
        typer.Option(help="empirical also fits books per layer and head, and says if they help."),
    ] = "analytic",
    seed: Seed = 42,
    force: ForceFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """Fit frames and Lloyd-Max codebooks per level, and measure candidate codes."""
    from sphkv_cli.fit.options import FitOptions
    from sphkv_cli.fit.stage import fit_codebooks
    from sphkv_cli.fit.view import view
    from sphkv_cli.render import Output, TerminalProgress

    options = FitOptions(
        codes=tuple(code or ()),
        tiers=tuple(tier or ()),
        rotation=rotation,
        centring=centring,
        density=density,
        seed=seed,
    )
    with TerminalProgress() as progress:
        result = fit_codebooks(options, capture, output, progress=progress, force=force)
    Output(json_output).show(result, view(result))
