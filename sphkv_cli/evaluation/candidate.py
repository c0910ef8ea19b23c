"""One coding that a document is put through, and the row and family that its scores go into."""

import re
from dataclasses import dataclass

from sphkv_cli.evaluation.coding import KeyValueCoding

_SEED = re.compile(r", seed \d+$")


@dataclass(frozen=True)
class Candidate:
    """coding; is_ours: whether gates hold for it; family: rows of one method at several rates (a
    line of the figure), empty where the row is alone."""

    coding: KeyValueCoding
    is_ours: bool
    family: str = ""

    @property
    def row(self) -> str:
        """Name of the row that its scores go into; rotation seeds of one code share theirs."""
        return _SEED.sub("", self.coding.name)
