"""`sphkv doctor` for people."""

from sphkv_cli.blocks import Block, Table
from sphkv_cli.doctor.checks import Diagnosis


def view(diagnosis: Diagnosis) -> tuple[Block, ...]:
    """What is here, and what can run."""
    return (
        Table(
            "This environment",
            ("what", "", "found", "to mend it"),
            [(c.subject, "ok" if c.ok else "no", c.finding, c.mend) for c in diagnosis.checks],
            text_columns=4,
        ),
        Table(
            "What it can run",
            ("command", "", "because"),
            [(c.command, "yes" if c.ok else "no", c.because) for c in diagnosis.capabilities],
            text_columns=3,
        ),
    )
