"""One compiled kernel: what is fixed at compile time, and the CUDA source that says so.

A variant is a pure description: head_dim, the formats of its tiers, group tiles, options. Batch and
page order are run-time arguments, group size and page size only within what a variant is made for:
groups up to 8 or up to 16 (group_tiles), of exactly 1 or 2 with query tables (table_heads), pages
of 16 tokens or larger ones (small_pages). Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sphkv_kernels.block_words import native_layout_of
from sphkv_kernels.kernel_structs import KernelParams, agreement
from sphkv_kernels.plan import FIRST_PAGES, SEGMENT_INTS
from sphkv_kernels.table_space import ROW_BYTES, TableSet, TableSpace
from sphkv_kernels.tier import PageError, TierFormat
from sphkv_kernels.tier_dispatch import TABLE_HEAD_DIMS, TierDispatch

CUDA_FOLDER = Path(__file__).parent / "cuda"
COMMON_SOURCES = ("intrinsics.cuh", "params.cuh", "formats.cuh", "tables.cuh", "attend.cuh")
DECODE_SOURCES = ("position.cuh", "{scores}", "run.cuh", "{dispatch}", "decode.cu")
SUPPORTED_HEAD_DIMS = (64, 128, 256)
SHARED_BYTES = {
    capability: 1024 * kilobytes
    for kilobytes, capabilities in {
        99: (86, 89, 120, 121),
        163: (80, 87),
        227: (90, 100, 103, 110),
    }.items()
    for capability in capabilities
}
"""Shared memory of a block by compute capability (CUDA programming guide)."""
MAX_POSITION_GROUPS = 32
COEFFICIENT_BYTES, FREQUENCY_BYTES, RUN_FEATURE_BYTES = 256, 32, 1024
"""Of a group of four RoPE pairs (`cuda/position.cuh`): per query tile, once, and for runs."""
SEGMENT_BYTES = 4 * SEGMENT_INTS
LISTED_SEGMENTS = (64, 16)
"""Segments of a block that a kernel of several tiers keeps in shared memory; the fewer where the
more would leave no room for better tables."""
SHARED_QUERY_BYTES = 4 * 1024 + 32
"""Fragments of one query tile at head_dim 128, the heads' scales, and the book."""
PRESENT_BYTES = 16
"""Which tiers' tables are there, where they take turns."""
MIN_BUFFERS = 4


@dataclass(frozen=True)
class Variant:
    """What a kernel is specialised for.

    tiers: in the order of the cache's tier indices; group_tiles: 1 for groups up to 8, 2 for 16;
    logits: writes logits instead of attention; window, softcap: support them; n_warps: per block;
    small_pages: for pages of 16 tokens; reconstruct: writes dense bf16 keys and values instead (a
    baseline; spherical tiers only); position_groups: groups of four RoPE pairs of a position term,
    0 without one, a power of two; offset_bytes: of an offset of `PagePositions`, 4 or 2, or 0 where
    the tokens of every page follow one another; near_offsets: none exceeds `NEAR`; position_bytes:
    of a position that a window reads, 4 or 2; table_heads: 1 or 2 scores keys of groups of that
    size by tables made from the query, 0 by fragments.
    """

    tiers: tuple[TierFormat, ...]
    head_dim: int
    group_tiles: int
    logits: bool = False
    window: bool = False
    softcap: bool = False
    n_warps: int = 12
    small_pages: bool = False
    reconstruct: bool = False
    position_groups: int = 0
    offset_bytes: int = 0
    near_offsets: bool = True
    position_bytes: int = 4
    table_heads: int = 0

    def __post_init__(self) -> None:
        if self.head_dim not in SUPPORTED_HEAD_DIMS:
            raise PageError(f"head_dim {self.head_dim}: the CUDA kernel has {SUPPORTED_HEAD_DIMS}")
        if self.group_tiles not in (1, 2):
            raise PageError("the CUDA kernel serves groups of 1 to 16 query heads per KV head")
        if self.offset_bytes not in (0, 2, 4) or self.position_bytes not in (2, 4):
            raise PageError(
                f"offsets of {self.offset_bytes} and positions of {self.position_bytes} bytes: the "
                "CUDA kernel reads offsets of 2 or 4 (0: none) and positions of 2 or 4"
            )
        if self.near_offsets and self.offset_bytes == 4:
            raise PageError("offsets of 4 bytes are not near: they meet all bits of a frequency")
        if self.position_groups & (self.position_groups - 1):
            raise PageError(f"position_groups {self.position_groups}: a power of two, or 0")
        if not 0 <= self.position_groups <= MAX_POSITION_GROUPS:
            raise PageError(
                f"a position term of {4 * self.position_groups} RoPE pairs: the CUDA kernel serves "
                f"at most {4 * MAX_POSITION_GROUPS}"
            )
        if self.table_heads and (self.reconstruct or self.head_dim not in TABLE_HEAD_DIMS):
            raise PageError(
                f"query tables are for attention at head_dim {TABLE_HEAD_DIMS}, not {self.head_dim}"
            )


def output_fragments(head_dim: int, group_tiles: int) -> int:
    """float4 of one part's output, as lanes hold them."""
    return group_tiles * (2 if head_dim == 256 else 1) * 8 * 32


@dataclass(frozen=True)
class KernelSource:
    """CUDA text and what its launch needs.

    table_rows: (n_rows, 4) fp16, the compact tables one after the other; shared_bytes: dynamic
    shared memory.
    """

    text: str
    kernel_name: str
    n_threads: int
    shared_bytes: int
    table_rows: npt.NDArray[np.float16] = field(repr=False)


def kernel_source(variant: Variant, capability: int) -> KernelSource:
    """The CUDA source of a variant for a compute capability (90 = sm_90)."""
    if capability not in SHARED_BYTES:
        raise PageError(
            f"compute capability {capability}: the CUDA kernel is built for {sorted(SHARED_BYTES)}"
        )
    placed = _placed(variant, SHARED_BYTES[capability])
    if placed is None:
        raise PageError(_too_large(variant, capability))
    dispatch, layout, runs = placed
    if variant.table_heads and dispatch.book is None:
        raise PageError("no tier of this cache has a key code that query tables serve")
    rows, last_rows = dispatch.table_rows()
    name = "ada_logits" if variant.logits else "ada_decode"
    sources: tuple[str, ...] = DECODE_SOURCES
    if variant.reconstruct:
        name, sources = "reconstruct", ("reconstruct.cuh", "{dispatch}", "reconstruct.cu")
    generated = {
        "{dispatch}": dispatch.function(reconstruct=variant.reconstruct),
        "{scores}": _read("score_tables.cuh") if variant.table_heads else "",
    }
    texts = [
        generated[source] if source in generated else _read(source)
        for source in (*COMMON_SOURCES, *sources)
    ]
    offsets = {
        **layout.offsets,
        "BOOK_ROW": last_rows,
        "PLACES_ROW": last_rows,
        "TABLE_BYTES": rows.nbytes,
        "TABLE_SUMS": int(dispatch.sums),
        "N_BUFFERS": layout.n_buffers,
        "POSITION_RUNS": int(runs),
    }
    preamble = _preamble(variant, capability, dispatch.space, offsets, name, split=dispatch.split)
    text = "\n".join([preamble, *texts, agreement("Params", KernelParams)])
    return KernelSource(text, name, 32 * variant.n_warps, layout.n_bytes, rows)


def _placed(variant: Variant, limit: int) -> tuple[TierDispatch, _SharedLayout, bool] | None:
    """The first of `_shared_choices` that fits: tables, places, whether runs have features."""
    for runs, listed, copies in _shared_choices(variant):
        n_shared = 0
        laid_out = partial(
            _shared_layout, variant, limit=limit, listed=listed, runs=runs,
            min_buffers=copies.min_buffers,
        )  # fmt: skip
        if copies.in_turn:
            without = laid_out(TableSpace(copies.replicas, 1))
            if without is None:
                continue
            n_shared = (limit - without.least_bytes) // ROW_BYTES
        space = TableSpace(copies.replicas, n_shared)
        dispatch = TierDispatch(space, variant.table_heads, copies.wide, copies.split)
        for tier in variant.tiers:
            dispatch.add(tier, reconstruct=variant.reconstruct)
        layout = laid_out(space)
        if layout is not None:
            return dispatch, layout, runs
    return None


def _too_large(variant: Variant, capability: int) -> str:
    """What to say where no choice fits."""
    if variant.table_heads:
        return "the query tables beside those of these tiers do not fit into shared memory"
    return (
        f"{len(variant.tiers)} tiers with {4 * variant.position_groups} RoPE pairs do not fit into "
        f"the {SHARED_BYTES[capability] // 1024} KB of shared memory of compute capability "
        f"{capability / 10:.1f}: fit with fewer of either, or use the reference backend"
    )


@dataclass(frozen=True)
class _SharedLayout:
    """Places in a block's shared memory, as the CUDA source names them; least_bytes: n_bytes with
    the fewest buffers."""

    offsets: dict[str, int]
    n_buffers: int
    n_bytes: int
    least_bytes: int


def _shared_layout(
    variant: Variant,
    space: TableSpace,
    limit: int,
    *,
    listed: int,
    runs: bool,
    min_buffers: int,
) -> _SharedLayout | None:
    """Tables, query tables, and buffers for the sums of `n_buffers` warps at a time; None where it
    does not fit, or not with so many."""
    heads = 8 * variant.group_tiles
    sides = [space.reserve(256), space.reserve(256)] if variant.table_heads else [0, 0]
    shared_query = -(-space.n_bytes // 128) * 128
    position = shared_query + (SHARED_QUERY_BYTES if variant.table_heads else 0)
    of_group = variant.group_tiles * COEFFICIENT_BYTES + FREQUENCY_BYTES + runs * RUN_FEATURE_BYTES
    segments = position + variant.position_groups * of_group
    present = segments + listed * SEGMENT_BYTES
    totals = present + (PRESENT_BYTES if space.n_shared_rows else 0)
    if variant.logits or variant.reconstruct:  # no sums to add up
        scratch, n_buffers, end, least = totals, 1, totals, totals
    else:
        buffer_bytes = 16 * output_fragments(variant.head_dim, variant.group_tiles)
        scratch = totals + (variant.n_warps + 1) * heads * 8 + 16
        n_buffers = min(variant.n_warps, (limit - scratch) // buffer_bytes)
        end, least = (scratch + n * buffer_bytes for n in (n_buffers, min_buffers))
        if n_buffers < min_buffers:
            return None
    offsets = {
        "QUERY_TABLE_OFFSET": sides[0],
        "QUERY_TABLE_OTHER_SIDE": sides[1],
        "SHARED_QUERY_OFFSET": shared_query,
        "POSITION_OFFSET": position,
        "SEGMENTS_OFFSET": segments,
        "LISTED_SEGMENTS": listed,
        "PRESENT_OFFSET": present,
        "TOTALS_OFFSET": totals,
        "SCRATCH_OFFSET": scratch,
    }
    return _SharedLayout(offsets, n_buffers, end, least) if end <= limit else None


class _Copies(NamedTuple):
    """How tables lie: copies of every row, the fewest buffers for sums beside them, wide tables
    where a code has them, whether those of the tiers take turns in the same places, and whether
    large ones are split."""

    replicas: int
    min_buffers: int
    wide: bool = False
    in_turn: bool = False
    split: bool = False


def _shared_choices(variant: Variant) -> list[tuple[bool, int, _Copies]]:
    """(features of runs of tokens, segments listed, tables) to try, best first: nothing takes the
    place of better tables, which gain more. Tables with fewer copies cost every lookup, those that
    take turns a barrier where a block goes from one tier to another. Without the features every
    token makes its own, as where pages have gaps; segments beyond the list are read from memory."""
    tables = [_Copies(16, 1)]
    if not variant.table_heads:
        tables = [_Copies(16, MIN_BUFFERS, wide=True), _Copies(16, MIN_BUFFERS)]
        may_turn = 1 < len(variant.tiers) <= 32 and not variant.reconstruct
        if may_turn:  # copies are worth more than buffers
            tables += [_Copies(16, least, in_turn=True) for least in (MIN_BUFFERS, 1)]
        tables += [
            _Copies(replicas, least, in_turn=in_turn, split=split)
            for replicas, least in ((8, MIN_BUFFERS), (4, 1), (2, 1))
            for split in (False, True)
            for in_turn in ((False, True) if may_turn else (False,))
        ]
    features = (True, False) if variant.position_groups and not variant.offset_bytes else (False,)
    lists = LISTED_SEGMENTS if len(variant.tiers) > 1 else (0,)
    return [(runs, listed, one) for one in tables for runs in features for listed in lists]


def _overwritten(space: TableSpace, by: TableSet) -> int:
    """A bit for every other set that lies in the same places."""
    return sum(1 << i for i, one in enumerate(space.sets) if one is not by and one.overlaps(by))


def _read(source: str) -> str:
    return (CUDA_FOLDER / source).read_text()


def _preamble(
    variant: Variant,
    capability: int,
    space: TableSpace,
    offsets: dict[str, int],
    name: str,
    *,
    split: bool,
) -> str:
    def has_norm(tier: TierFormat) -> bool:
        region = tier.value_format
        if isinstance(region, str):
            return region == "int8"
        layout = native_layout_of(region)
        return layout is not None and layout.has_norm

    constants = {
        "HEAD_DIM": variant.head_dim,
        "N_WARPS": variant.n_warps,
        "N_THREADS": 32 * variant.n_warps,
        "GROUP_TILES": variant.group_tiles,
        "REPLICAS": space.replicas,
        "SPLIT_ROWS": int(split),
        # Shared memory starts after 1 KB reserved from sm_90 on; the kernel traps if it does not.
        "SHARED_BASE": 1024 if capability >= 90 else 0,
        "SOFTCAP": int(variant.softcap),
        "WINDOW": int(variant.window),
        "LOGITS": int(variant.logits),
        "ANY_VALUE_NORM": int(any(has_norm(tier) for tier in variant.tiers)),
        "FRAGMENTS": output_fragments(variant.head_dim, variant.group_tiles),
        "SMALL_PAGES": int(variant.small_pages),
        "FIRST_PAGES": FIRST_PAGES,
        "N_TABLES": len(space.tables),
        "N_TABLE_ROWS": space.n_rows,
        "TABLE_SETS": len(space.sets),
        "POSITION_GROUPS": variant.position_groups,
        "POSITION_BYTES": variant.position_bytes,
        "OFFSET_BYTES": variant.offset_bytes,
        "NEAR_OFFSETS": int(variant.near_offsets),
        "TABLE_HEADS": variant.table_heads,
        **offsets,
        "KERNEL_NAME": name,
    }

    def array(name: str, values: list[int], suffix: str = "") -> str:
        numbers = ", ".join(f"{value}{suffix}" for value in values) or "0"
        kind = "unsigned int" if suffix else "int"
        return f"static constexpr __device__ {kind} {name}[] = {{{numbers}}};"

    return "\n".join(
        [
            *(f"#define {key} {value}" for key, value in constants.items()),
            array("TABLE_FIRST_ROW", space.first_rows),
            array("TABLE_OFFSET", space.offsets),
            array("TABLE_TURNED", [int(turned) for turned in space.turned]),
            array("SET_FIRST_ROW", [one.first_row for one in space.sets]),
            array("SET_ROWS", [one.n_rows for one in space.sets]),
            array("SETS_OVERWRITTEN", [_overwritten(space, one) for one in space.sets], "u"),
        ]
    )
