"""What a command says when it cannot do what it was asked, and the exit code that goes with it.

Exit codes: 0 ok, 1 failed, 2 usage, 3 a gate failed, 4 this environment cannot run it.
"""


class SphkvError(Exception):
    """A failure that the user can act on: what, which value, what to do next.

    `message` is one line; `hint` is the next step, printed on the same line after it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}; {hint}" if hint else message)
        self.message = message
        self.hint = hint


class ArtifactError(SphkvError):
    """A file that is missing, damaged, foreign, too new, or not made from the file it claims."""


class UsageError(SphkvError):
    """An argument that cannot be meant: unparsable, out of range, or contradicting another one."""

    exit_code = 2


class GateFailed(SphkvError):  # noqa: N818  (a gate that failed is not an error of the program)
    """The report was made and written, and a limit that the user set does not hold."""

    exit_code = 3


class EnvironmentUnable(SphkvError):  # noqa: N818
    """This machine lacks what the command needs: a GPU, an extra, a model package."""

    exit_code = 4
