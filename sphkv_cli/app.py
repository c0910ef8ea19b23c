"""The command line: every command in the order of `--help`, and the entry point."""

import importlib
import signal
import sys
from typing import NoReturn

from sphkv_cli.commands.registry import app

__all__ = ["app", "run"]

_COMMANDS = (
    *("capture", "fit_codebooks", "allocate", "profile", "evaluate", "generate"),
    *("compare", "study", "inspect", "doctor"),
)
for _name in _COMMANDS:
    importlib.import_module(f"sphkv_cli.commands.{_name}")


def run() -> None:
    """Run the command line; the entry point of the installed script."""
    # SIGTERM unwinds like Ctrl-C, so that a stopped run removes its half-written files.
    signal.signal(signal.SIGTERM, _on_sigterm)
    app()


def _on_sigterm(_signal: int, _frame: object) -> NoReturn:
    sys.exit(143)
