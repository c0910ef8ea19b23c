"""What the scripts of this folder share: the GPU and the commit they need, and how they fail."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
    """The checkout's commit, marked where tracked files differ from it.

    Raises:
        UsageError: there is no history.
    """

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else ""

    name = git("rev-parse", "HEAD")
    if not name:
        raise UsageError("no git history here", "name the commit with --commit")
    return name + ("-modified" if git("status", "--porcelain", "-uno") else "")
