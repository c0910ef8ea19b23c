"""The Typer application, how a command is registered, and the options that commands share.

A command opens, calls one function and renders its result. Heavy imports stand inside the
commands, so that `sphkv --help` never loads torch.
"""

import functools
from collections.abc import Callable, Container
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

from sphkv_cli.errors import SphkvError
from sphkv_cli.option_checks import refuse_given

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
CaptureArgument = Annotated[Path, typer.Argument(help="The capture: capture.h5.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]


def _print_version(asked: bool) -> None:
    if asked:
        from sphkv_cli.artifacts.running_code import code_version

        typer.echo(f"sphkv {code_version() or 'of an unknown version'}")
        raise typer.Exit


@app.callback()
def _shared(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    del version  # its callback has printed it


def options_typed(command_line: typer.Context) -> dict[str, str]:
    """By name of their parameter, the options that stand on the command line, as they are typed."""
    found = {}
    for parameter in command_line.command.params:
        name = str(parameter.name)
        source = command_line.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            found[name] = max(parameter.opts, key=len)
    return found


def refuse_typed(command_line: typer.Context, where: str, names: Container[str]) -> None:
    """Refuse options of another mode than the one asked for, by name of their parameter.

    where: as `refuse_given`.
    """
    typed = options_typed(command_line)
    refuse_given(where, {option: name in names for name, option in typed.items()})


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
                left = error.args[0] if error.args else "no half-written artifact left"
                typer.echo(f"sphkv {name}: interrupted, {left}", err=True)
                raise typer.Exit(130) from error

        return app.command(name)(guarded)

    return register
