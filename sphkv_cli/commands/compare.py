"""`sphkv compare`."""

from pathlib import Path
from typing import Annotated

import typer

from sphkv_cli.commands.registry import CaptureArgument, ForceFlag, JsonFlag, Seed, command


@command("compare")
def compare_command(
    capture: CaptureArgument,
    codebooks: Annotated[
        Path | None, typer.Option(help="Their frames centre, and their codes take part.")
    ] = None,
    rates: Annotated[
        str, typer.Option(help="Bits per coordinate at which a winner is named.")
    ] = "2,3,4",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A family of rivals, repeatable: turboquant-mse, turboquant-prod, qjl, eden, "
            "kivi, kmeans, wu, integer, fp8. All of them without it."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The report to write (JSON).")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw error against bits to this .png or .svg.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Rotations per rotated method, from --seed on.")] = 3,
    window: Annotated[
        int, typer.Option(help="Tokens before each query that stay dense, as evaluate has it.")
    ] = 32,
    first_tokens: Annotated[int, typer.Option(help="First tokens that stay dense.")] = 4,
    max_documents: Annotated[int, typer.Option(help="Judge documents, the first ones.")] = 4,
    max_queries: Annotated[
        int, typer.Option(help="Queries per document and layer, evenly spaced.")
    ] = 64,
    max_layers: Annotated[
        int | None, typer.Option(help="Layers looked at, evenly spaced; all without it.")
    ] = None,
    seed: Seed = 42,
    force: ForceFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """Set the polar codes beside the published methods at equal bytes, and say who wins."""
    from sphkv_cli.comparison.options import CompareOptions, parse_rates
    from sphkv_cli.comparison.stage import compare
    from sphkv_cli.comparison.view import view
    from sphkv_cli.render import Output, TerminalProgress

    options = CompareOptions(
        rates=parse_rates(rates),
        methods=tuple(method or ()),
        seeds=seeds,
        window=window,
        first_tokens=first_tokens,
        max_documents=max_documents,
        max_queries=max_queries,
        max_layers=max_layers,
        seed=seed,
    )
    with TerminalProgress() as progress:
        result = compare(
            options,
            capture,
            codebooks=codebooks,
            output=output,
            plot=plot,
            progress=progress,
            force=force,
        )
    Output(json_output).show(result, view(result))
