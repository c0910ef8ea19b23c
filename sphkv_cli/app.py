"""The commands of sphkv: each opens, calls one function and renders its result.

Heavy imports stand inside the commands, so that `sphkv --help` never loads torch.
"""

import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn, ParamSpec, TypeVar

import typer

from sphkv_cli.errors import SphkvError

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    name="sphkv",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Design KV-cache codes offline and prove them on the GPU they will run on.\n\n"
    "capture -> fit-codebooks -> allocate -> profile; each stage writes one artifact. "
    "Exit codes: 0 ok, 1 failed, 2 usage, 3 a gate failed, 4 this environment cannot run it.",
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]
ForceFlag = Annotated[bool, typer.Option("--force", help="Overwrite an existing output.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]


def run() -> None:
    """Run the command line; the entry point of the installed script."""
    # SIGTERM unwinds like Ctrl-C, so that a stopped run removes its half-written files.
    signal.signal(signal.SIGTERM, _on_sigterm)
    app()


def _on_sigterm(_signal: int, _frame: object) -> NoReturn:
    sys.exit(143)


def command(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a command whose `SphkvError` becomes one line on stderr and its exit code."""

    def register(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except SphkvError as error:
                typer.echo(f"sphkv {name}: {error}", err=True)
                raise typer.Exit(error.exit_code) from error
            except KeyboardInterrupt as error:
                typer.echo(f"sphkv {name}: interrupted, no half-written artifact left", err=True)
                raise typer.Exit(130) from error

        return app.command(name)(guarded)

    return register


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


@command("doctor")
def doctor_command(json_output: JsonFlag = False) -> None:
    """Say what this environment can run, what is missing, and the command that mends it."""
    from sphkv_cli.doctor.checks import diagnose
    from sphkv_cli.doctor.view import view
    from sphkv_cli.render import Output

    diagnosis = diagnose()
    Output(json_output).show(diagnosis, view(diagnosis))
    if not diagnosis.core_ok:
        raise typer.Exit(4)
