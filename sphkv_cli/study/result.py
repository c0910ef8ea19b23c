"""What a study found: tables, figures as data, and a reading made from the numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sphkv_cli.blocks import Table
from sphkv_cli.plots.figures import Figure


@dataclass(frozen=True)
class StudyResult:
    """tables and figures in the order of reading.

    reading: two plain sentences computed from the numbers, the surprise first; conditions: what
    the numbers hold for (documents, window and first tokens, rates), one sentence each.
    """

    tables: Sequence[Table]
    figures: Sequence[Figure]
    reading: tuple[str, str]
    conditions: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if not self.tables:
            raise ValueError("a study without a table says nothing")
        if len(self.reading) != 2 or not all(sentence.strip() for sentence in self.reading):
            raise ValueError("a reading is two sentences")
        names = [figure.name for figure in self.figures]
        if len(set(names)) < len(names):
            raise ValueError(f"two figures share a name: {', '.join(names)}")
