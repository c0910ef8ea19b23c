"""`sphkv inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from sphkv_cli.commands.registry import JsonFlag, command


@command("inspect")
def inspect_command(
    artifact: Annotated[Path, typer.Argument(help="Any artifact: .h5 or a report .json.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Recompute the content digest and compare.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Print what an artifact is, what it was made from, and its main tables."""
    from sphkv_cli.inspection.stage import inspect_artifact
    from sphkv_cli.inspection.view import view
    from sphkv_cli.render import Output

    result = inspect_artifact(artifact, verify=verify)
    Output(json_output).show(result, view(result))
    if result.digest_ok is False:
        raise typer.Exit(1)
