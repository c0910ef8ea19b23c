"""What the scripts of this folder share: the GPU and the commit they need, and how they fail."""

import sys
from collections.abc import Callable
from pathlib import Path

from sphkv_cli.artifacts.running_code import code_commit
from sphkv_cli.errors import EnvironmentUnable, SphkvError, UsageError


def run(main: Callable[[], None]) -> None:
    """Run a script; a failure that its user can act on is one line and its exit code."""
    try:
        main()
    except SphkvError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def require_gpu(hint: str = "run it where there is one") -> None:
    """Refuse a machine without a GPU; raises EnvironmentUnable."""
    import torch

    if not torch.cuda.is_available():
        raise EnvironmentUnable("needs a CUDA GPU and torch sees none", hint)


def commit() -> str:
    """As `code_commit`.

    Raises:
        UsageError: there is no history.
    """
    found = code_commit()
    if found is None:
        raise UsageError("no git history here", "name the commit with --commit")
    return found
