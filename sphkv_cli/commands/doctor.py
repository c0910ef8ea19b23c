"""`sphkv doctor`."""

import typer

from sphkv_cli.commands.registry import JsonFlag, command


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
