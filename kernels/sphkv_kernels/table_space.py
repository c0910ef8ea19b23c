"""Where the lookup tables of a kernel lie in shared memory: columns of copies in rows of 256 bytes.

A table row of 8 bytes is repeated `replicas` times, a column. With 16 (128 bytes) the lanes of a
half-warp, which one load serves at a time, never meet in a bank; 8, 4 or 2 leave room for more
tables, and as many as 2, 4 or 8 lanes share a bank. Tables of equal content are stored once,
however many codes use them. Where the tables of all tiers do not fit, those of each tier are a set
of their own, also those that other sets have; sets take turns in the same places, and a block
brings in those of the tiers that it reads. Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from sphkv_kernels.lookup_tables import Table

ROW_BYTES = 256


@dataclass(frozen=True)
class TableSet:
    """Tables of one tier: n_rows of the compact ones from first_row on, in `height` rows of the
    space from `base` on."""

    first_row: int
    n_rows: int
    base: int
    height: int

    def overlaps(self, other: TableSet) -> bool:
        """Whether bringing in the other one overwrites some of this one."""
        first_end = min(self.base + self.height, other.base + other.height)
        return max(self.base, other.base) < first_end


@dataclass
class TableSpace:
    """Tables in columns: first fit into the shorter column.

    n_shared_rows: rows in which sets take turns, 0 where all tables stay.
    """

    replicas: int
    n_shared_rows: int = 0
    tables: list[Table] = field(default_factory=list)
    turned: list[bool] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    first_rows: list[int] = field(default_factory=list)
    registers: list[Table] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    sets: list[TableSet] = field(default_factory=list)
    n_bytes: int = 0

    def __post_init__(self) -> None:
        self.heights = [0] * (ROW_BYTES // (8 * self.replicas))

    def begin_set(self, height: int) -> None:
        """What is placed from here on is of the next tier, and takes `height` rows: behind the set
        before, so that neighbours stay together where they can, or at the beginning again."""
        before = self.sets[-1] if self.sets else TableSet(0, 0, 0, 0)
        base = before.base + before.height
        if base + height > self.n_shared_rows:
            base = 0
        self.heights = [base] * len(self.heights)
        self.sets.append(TableSet(self.n_rows, 0, base, height))

    def end_set(self) -> None:
        """All tables of the set are placed."""
        begun = self.sets[-1]
        self.sets[-1] = replace(begun, n_rows=self.n_rows - begun.first_row)

    def row_places(self) -> npt.NDArray[np.uint32]:
        """Byte offset of the first copy of every row, padded to an even number of them."""
        places = [
            offset + ROW_BYTES * np.arange(table.shape[0])
            for offset, table in zip(self.offsets, self.tables, strict=True)
        ]
        every = np.concatenate([*places, np.zeros(self.n_rows % 2, np.int64)])
        return every.astype(np.uint32)

    def place(self, table: Table, *, turned: bool = False) -> int:
        """Byte offset of `table` in shared memory; turned: copies 8 to 15 have their halves swapped
        (for lanes that take the second half of a block first: `cuda/score_tables.cuh`)."""
        known = self._find(table, turned=turned)
        if known is None:
            known = self._put(table, int(np.argmin(self.heights)), turned=turned)
        return known

    def place_side_by_side(self, left: Table, right: Table) -> int:
        """Byte offset of `left`, `right` being the next column of the same rows."""
        known = self._find(left)
        if known is not None and self._find(right) == known + 8 * self.replicas:
            return known
        pairs = [max(pair) for pair in zip(self.heights, self.heights[1:], strict=False)]
        column = int(np.argmin(pairs))
        self.heights[column : column + 2] = [pairs[column]] * 2
        offset = self._put(left, column)
        self._put(right, column + 1)
        return offset

    def reserve(self, n_rows: int) -> int:
        """Byte offset of a column that the kernel fills itself."""
        column = int(np.argmin(self.heights))
        offset = self.heights[column] * ROW_BYTES + column * 8 * self.replicas
        self._raise(column, n_rows)
        return offset

    @property
    def n_rows(self) -> int:
        return sum(table.shape[0] for table in self.tables)

    def _find(self, table: Table, *, turned: bool = False) -> int | None:
        content = table.tobytes(), turned
        first_row = self.sets[-1].first_row if self.sets else 0
        for index, known in enumerate(self.tables):
            of_set = self.first_rows[index] >= first_row
            if of_set and (known.tobytes(), self.turned[index]) == content:
                return self.offsets[index]
        return None

    def _put(self, table: Table, column: int, *, turned: bool = False) -> int:
        offset = self.heights[column] * ROW_BYTES + column * 8 * self.replicas
        self._raise(column, table.shape[0])
        self.first_rows.append(self.n_rows)
        self.tables.append(table)
        self.turned.append(turned)
        self.offsets.append(offset)
        return offset

    def _raise(self, column: int, n_rows: int) -> None:
        self.heights[column] += n_rows
        self.n_bytes = max(self.n_bytes, self.heights[column] * ROW_BYTES)
