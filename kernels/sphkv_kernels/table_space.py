"""Where the lookup tables of a kernel lie in shared memory: columns of 128 bytes in rows of 256.

A table row of 8 bytes is repeated `replicas` times, so that lanes never meet in a bank; 16 replicas
make a column of 128 bytes. Tables of equal content are stored once, however many codes use them.
Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sphkv_kernels.lookup_tables import Table

ROW_BYTES = 256


@dataclass
class TableSpace:
    """Tables in columns: first fit into the shorter column."""

    replicas: int
    tables: list[Table] = field(default_factory=list)
    turned: list[bool] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    first_rows: list[int] = field(default_factory=list)
    registers: list[Table] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.heights = [0] * (ROW_BYTES // (8 * self.replicas))

    def place(self, table: Table, *, turned: bool = False) -> int:
        """Byte offset of `table` in shared memory; turned: copies 8 to 15 have their halves swapped
        (for lanes that take the second half of a block first: `cuda/score_tables.cuh`)."""
        known = self._find(table, turned=turned)
        if known is None:
            known = self._put(table, int(np.argmin(self.heights)), turned=turned)
        return known

    def place_side_by_side(self, left: Table, right: Table) -> int:
        """Byte offset of `left`, `right` being the next column of the same rows (16 replicas)."""
        known = self._find(left)
        if known is not None and self._find(right) == known + ROW_BYTES // 2:
            return known
        self.heights = [max(self.heights)] * len(self.heights)
        offset = self._put(left, 0)
        self._put(right, 1)
        return offset

    def reserve(self, n_rows: int) -> int:
        """Byte offset of a column that the kernel fills itself."""
        column = int(np.argmin(self.heights))
        offset = self.heights[column] * ROW_BYTES + column * 8 * self.replicas
        self.heights[column] += n_rows
        return offset

    @property
    def n_bytes(self) -> int:
        return max(self.heights) * ROW_BYTES

    @property
    def n_rows(self) -> int:
        return sum(table.shape[0] for table in self.tables)

    def _find(self, table: Table, *, turned: bool = False) -> int | None:
        content = table.tobytes(), turned
        for index, known in enumerate(self.tables):
            if (known.tobytes(), self.turned[index]) == content:
                return self.offsets[index]
        return None

    def _put(self, table: Table, column: int, *, turned: bool = False) -> int:
        offset = self.heights[column] * ROW_BYTES + column * 8 * self.replicas
        self.heights[column] += table.shape[0]
        self.first_rows.append(self.n_rows)
        self.tables.append(table)
        self.turned.append(turned)
        self.offsets.append(offset)
        return offset
