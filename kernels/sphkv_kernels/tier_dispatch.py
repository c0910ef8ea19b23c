"""Which C++ types serve the tiers of a kernel, and the lookup tables that they need.

A spherical region becomes a type of `cuda/formats.cuh` (it decodes to fragment registers), or, for
keys of a kernel with query tables, of `cuda/score_tables.cuh` (it looks scores up). One query
table fits beside the others: it serves the tiers whose level-1 tables are those of the first tier
that can use it; keys of other tiers meet the query in fragments. Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.block_words import decoded_layout_of
from sphkv_kernels.layout import NativeLayout, Scheme
from sphkv_kernels.lookup_tables import CodeTables, Table, code_tables, wide_tables
from sphkv_kernels.table_space import ROW_BYTES, TableSpace
from sphkv_kernels.tier import PageError, RegionFormat, TierFormat

TABLE_HEAD_DIMS = (64, 128)
MOST_ROWS = 256
"""Of a column, where tables are split."""
_FRAGMENT_CLASS: dict[Scheme, str] = {
    "pair_half": "PairHalf",
    "pair_swap": "PairSwap",
    "pair_nine": "PairNine",
    "pair_nine_float": "PairNineFloat",
    "single": "Single",
    "quad": "Quad",
    "quad_spread": "QuadSpread",
}
_SCORE_CLASS: dict[Scheme, str] = {
    "pair_half": "PairHalfScores",
    "pair_swap": "PairSwapScores",
    "pair_nine_float": "PairNineFloatScores",
    "quad": "QuadScores",
}


@dataclass
class TierDispatch:
    """Tables placed so far, the statement that runs each tier, and what query tables are made of.

    table_heads: heads of the query tables, 0 for fragments alone; wide: spend shared memory on
    tables that save instructions; split: tables of more than 256 rows lie in two columns (two
    instructions more for a lookup); row_tiers: the int8 and dense ones; book: (256, 4) rows of the
    query table's bytes; sums: an entry holds the sum of a quad for both heads.
    """

    space: TableSpace
    table_heads: int
    wide: bool
    split: bool = False
    cases: list[str] = field(default_factory=list)
    row_tiers: list[int] = field(default_factory=list)
    book: Table | None = None
    sums: bool = False

    def add(self, tier: TierFormat, *, reconstruct: bool) -> None:
        """Place the tables of a tier and add its statement; PageError where it has none."""
        if reconstruct and tier.kind != "spherical":
            raise PageError(f"tier {tier.name!r}: only spherical tiers are reconstructed")
        if self.space.n_shared_rows:
            alone = TierDispatch(
                TableSpace(self.space.replicas), self.table_heads, self.wide, self.split
            )
            alone.add(tier, reconstruct=reconstruct)
            self.space.begin_set(alone.space.n_bytes // ROW_BYTES)
        self._add(tier, reconstruct=reconstruct)
        if self.space.n_shared_rows:
            self.space.end_set()

    def _add(self, tier: TierFormat, *, reconstruct: bool) -> None:
        arguments = "state, segment, p, lane, warp"
        if tier.kind != "spherical":
            name = "DenseRow" if tier.kind == "dense" else "Int8Row"
            self.row_tiers.append(len(self.cases))
            self.cases.append(f"run_row_pages<{name}>({arguments}, offset);")
            return
        key, key_row = self._key_type(tier.key_format)
        value, value_row = self._type(*_native(tier.value_format))
        rows = (
            f"__ldg(p.tables + REGISTER_ROW + {key_row}), "
            f"__ldg(p.tables + REGISTER_ROW + {value_row})"
        )
        if reconstruct:
            run = f"reconstruct_pages<{key}, {value}>(p, segment, lane, warp, {rows});"
        else:
            run = f"run_spherical<{key}, {value}>({arguments}, {rows}, offset);"
        self.cases.append(run)

    def _key_type(self, region: RegionFormat) -> tuple[str, int]:
        code, layout = _native(region)
        name = _SCORE_CLASS.get(layout.scheme) if self.table_heads else None
        if name is None:
            return self._type(code, layout)
        tables = code_tables(code, layout)
        sums = self.table_heads == 2 and layout.scheme == "quad"
        if self.book is None:
            self.book, self.sums = tables.shared[0], sums
        if self.sums != sums or self.book.tobytes() != tables.shared[0].tobytes():
            return self._type(code, layout)
        if layout.scheme == "quad":
            offsets = [self.space.place(tables.shared[1], turned=True)]
        elif layout.scheme == "pair_nine_float":
            top = tables.shared[2].copy()
            top[:, 2:] = top[:, 1::-1]
            offsets = [self.space.place(tables.shared[1]), self.space.place(top, turned=True)]
        else:
            offsets = [self.space.place(tables.shared[1])]
        return _type_name(name, offsets), self._registers(tables)

    def _type(self, code: SphericalCode, layout: NativeLayout) -> tuple[str, int]:
        """C++ type of a region's decode and its row of registers."""
        tables = code_tables(code, layout)
        if self.wide and layout.scheme == "pair_swap":
            weights = self.space.place_side_by_side(*wide_tables(code, layout))
            name, offsets = "PairWide", [self.space.place(tables.shared[0]), weights]
        else:
            name = _FRAGMENT_CLASS[layout.scheme]
            offsets = [self._place(table) for table in tables.shared]
        return _type_name(name, offsets), self._registers(tables)

    def _place(self, table: Table) -> int:
        if self.split and table.shape[0] > MOST_ROWS:
            return self.space.place_side_by_side(table[:MOST_ROWS], table[MOST_ROWS:])
        return self.space.place(table)

    def _registers(self, tables: CodeTables) -> int:
        self.space.registers.append(tables.registers)
        return len(self.space.registers) - 1

    def table_rows(self) -> tuple[Table, int]:
        """All rows that the kernel reads: tables, registers, and from the second on the book or,
        where sets take turns, the place of every table row (uint32 byte offsets)."""
        space = self.space
        registers = np.stack([*space.registers, np.zeros(4, np.float16)])
        last = np.zeros((0, 4), np.float16) if self.book is None else self.book
        if space.sets:
            last = space.row_places().view(np.float16).reshape(-1, 4)
        rows = np.concatenate([*space.tables, registers, last])
        return rows, space.n_rows + registers.shape[0]

    def function(self, *, reconstruct: bool) -> str:
        """The C++ function that runs a segment by its tier."""
        body = "\n".join(
            f"    case {index}: {case} break;" for index, case in enumerate(self.cases)
        )
        if reconstruct:
            signature = """reconstruct_tier(const Params& p, const Segment& segment,
    const Lane& lane, u32 warp)"""
        else:
            signature = """run_tier(State& state, const Segment& segment, const Params& p,
    const Lane& lane, u32 warp, const float (&offset)[GROUP_TILES][2])"""
        is_row = " || ".join(f"tier == {index}" for index in self.row_tiers) or "false"
        return f"""
static __device__ __forceinline__ bool is_row_tier(int tier) {{ return {is_row}; }}
// Warp-uniform: a segment has one tier.
constexpr int REGISTER_ROW = {self.space.n_rows};
static __device__ __forceinline__ void {signature} {{
  switch (segment.tier) {{
{body}
    default: break;
  }}
}}
"""


def has_query_table(region: RegionFormat, head_dim: int) -> bool:
    """Whether keys of this format can be scored by query tables."""
    if isinstance(region, str) or head_dim not in TABLE_HEAD_DIMS:
        return False
    layout = decoded_layout_of(region)
    return layout is not None and layout.scheme in _SCORE_CLASS


def require_readable(tiers: Sequence[TierFormat]) -> None:
    """Refuse tiers that the kernel has no decoder for: PageError."""
    for tier in tiers:
        if tier.kind == "spherical":
            _native(tier.key_format)
            _native(tier.value_format)


def _native(region: RegionFormat) -> tuple[SphericalCode, NativeLayout]:
    assert not isinstance(region, str)
    layout = decoded_layout_of(region)
    if layout is None:
        raise PageError(
            f"code {region.name!r} has no native layout: the CUDA kernel reads depth-4 codes with "
            "adjacent pairs of the widths in LAYOUT.md; use the reference backend for this one"
        )
    return region, layout


def _type_name(name: str, offsets: list[int]) -> str:
    return f"{name}<{', '.join(map(str, offsets))}>"
