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
    target_rate: Annotated[
        list[float] | None,
        typer.Option(
            help="Design instead: find the best codes of so many bits per coordinate, repeatable, "
            "rank them by measured attention-output error, keep the best as tiers."
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            help="Design at every rate of LOW:HIGH:STEP, as 2:4.5:0.25, and at any --target-rate."
        ),
    ] = None,
    native_only: Annotated[
        bool, typer.Option("--native-only", help="Design with codes that the CUDA kernel reads.")
    ] = False,
    rotation: Annotated[
        Literal["hadamard", "haar", "none"], typer.Option(help="Of keys, queries and values.")
    ] = "hadamard",
    centring: Annotated[
        Literal["auto", "none", "post_rope", "pre_rope"],
        typer.Option(help="Which mean is taken from the keys; auto measures it per layer."),
    ] = "auto",
    balancing: Annotated[
        Literal["auto", "none", "key_query"],
        typer.Option(help="Stretch keys where queries are long; auto measures it per layer."),
    ] = "auto",
    rope_pairs: Annotated[
        str, typer.Option(help="RoPE pairs kept of a mean before RoPE: a number, or auto.")
    ] = "auto",
    density: Annotated[
        Literal["analytic", "empirical"],
        typer.Option(help="empirical also fits books per layer and head, and says if they help."),
    ] = "analytic",
    seed: Seed = 42,
    force: ForceFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """Fit frames and Lloyd-Max codebooks per level, and measure candidate codes."""
    from sphkv_cli.fit.options import FitOptions, parse_rope_pairs, parse_sweep
    from sphkv_cli.fit.stage import fit_codebooks
    from sphkv_cli.fit.view import view
    from sphkv_cli.render import Output, TerminalProgress

    rates = (*(target_rate or ()), *(parse_sweep(sweep) if sweep else ()))
    options = FitOptions(
        codes=tuple(code or ()),
        tiers=tuple(tier or ()),
        rotation=rotation,
        centring=centring,
        balancing=balancing,
        rope_pairs=parse_rope_pairs(rope_pairs),
        density=density,
        seed=seed,
        target_rates=tuple(sorted(dict.fromkeys(rates))),
        native_only=native_only,
    )
    with TerminalProgress() as progress:
        result = fit_codebooks(options, capture, output, progress=progress, force=force)
    Output(json_output).show(result, view(result))
