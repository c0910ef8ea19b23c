"""One compiled kernel: what is fixed at compile time, and the CUDA source that says so.

A variant is a pure description: head_dim, the formats of its tiers, group tiles, options. Group
size, page size, batch and page order are run-time arguments. Tables of equal content are stored
once, however many codes use them; columns of 128 bytes (REPLICAS copies of 8) share rows of 256.
Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sphkv_kernels.block_words import native_layout_of
from sphkv_kernels.lookup_tables import Table, code_tables
from sphkv_kernels.tier import PageError, RegionFormat, TierFormat

CUDA_FOLDER = Path(__file__).parent / "cuda"
COMMON_SOURCES = ("intrinsics.cuh", "params.cuh", "formats.cuh", "tables.cuh", "attend.cuh")
DECODE_SOURCES = ("position.cuh", "run.cuh", "{dispatch}", "decode.cu")
SUPPORTED_HEAD_DIMS = (64, 128, 256)
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 87: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Shared memory of a block by compute capability (CUDA programming guide)."""
MAX_POSITION_GROUPS = 32
POSITION_FRAGMENT_BYTES = 16
SEGMENT_BYTES = 32
LISTED_SEGMENTS = 64
"""Segments of a block that a kernel of several tiers keeps in shared memory."""
ROW_BYTES = 256
WEIGHT_PARTS = 64

_SCHEME_CLASS = {
    "pair_half": "PairHalf",
    "pair_swap": "PairSwap",
    "pair_nine": "PairNine",
    "pair_nine_float": "PairNineFloat",
    "single": "Single",
    "quad": "Quad",
    "quad_spread": "QuadSpread",
}


@dataclass(frozen=True)
class Variant:
    """What a kernel is specialised for.

    tiers: in the order of the cache's tier indices; group_tiles: 1 for groups up to 8, 2 for 16;
    logits: writes logits instead of attention; window, softcap: support them; n_warps: per block;
    tile_units: units of 16 tokens that a warp decodes at a time; score_chains: 2 splits the
    products of a score into two chains; small_pages: for pages of 16 tokens; prefetch: into L2, two
    tiles ahead; reconstruct: writes dense bf16 keys and values instead (a baseline; spherical tiers
    only); position_groups: groups of four RoPE pairs of a position term, 0 without one;
    position_bytes: of one stored position, 4 or 2.
    """

    tiers: tuple[TierFormat, ...]
    head_dim: int
    group_tiles: int
    logits: bool = False
    window: bool = False
    softcap: bool = False
    n_warps: int = 12
    tile_units: int = 2
    score_chains: int = 1
    small_pages: bool = False
    prefetch: bool = True
    reconstruct: bool = False
    position_groups: int = 0
    position_bytes: int = 4

    def __post_init__(self) -> None:
        if self.head_dim not in SUPPORTED_HEAD_DIMS:
            raise PageError(f"head_dim {self.head_dim}: the CUDA kernel has {SUPPORTED_HEAD_DIMS}")
        if self.group_tiles not in (1, 2):
            raise PageError("the CUDA kernel serves groups of 1 to 16 query heads per KV head")
        if not 0 <= self.position_groups <= MAX_POSITION_GROUPS:
            raise PageError(
                f"a position term of {4 * self.position_groups} RoPE pairs: the CUDA kernel serves "
                f"at most {4 * MAX_POSITION_GROUPS}"
            )


@dataclass(frozen=True)
class KernelSource:
    """CUDA text and what its launch needs.

    table_rows: (n_rows, 4) fp16, the compact tables one after the other; shared_bytes: dynamic
    shared memory; fragments: float4 of one part's output.
    """

    text: str
    kernel_name: str
    n_threads: int
    shared_bytes: int
    fragments: int
    table_rows: npt.NDArray[np.float16] = field(repr=False)


@dataclass
class _TableSpace:
    """Tables in columns: first fit into the shorter column."""

    replicas: int
    tables: list[Table] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    first_rows: list[int] = field(default_factory=list)
    registers: list[Table] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.heights = [0] * (ROW_BYTES // (8 * self.replicas))

    def place(self, table: Table) -> int:
        """Byte offset of `table` in shared memory."""
        for known, offset in zip(self.tables, self.offsets, strict=True):
            if known.shape == table.shape and known.tobytes() == table.tobytes():
                return offset
        column = int(np.argmin(self.heights))
        offset = self.heights[column] * ROW_BYTES + column * 8 * self.replicas
        self.heights[column] += table.shape[0]
        self.first_rows.append(sum(t.shape[0] for t in self.tables))
        self.tables.append(table)
        self.offsets.append(offset)
        return offset

    @property
    def n_bytes(self) -> int:
        return max(self.heights) * ROW_BYTES


def kernel_source(variant: Variant, capability: int) -> KernelSource:
    """The CUDA source of a variant for a compute capability (90 = sm_90)."""
    if capability not in SHARED_BYTES:
        raise PageError(
            f"compute capability {capability}: the CUDA kernel is built for {sorted(SHARED_BYTES)}"
        )
    columns = 2 if variant.head_dim == 256 else 1
    fragments = variant.group_tiles * columns * 8 * 32
    heads = 8 * variant.group_tiles
    fixed = variant.n_warps * heads * 8 + heads * 8 + 16
    limit = SHARED_BYTES[capability]
    for replicas in (16, 8, 4, 2):
        space, cases = _place_tiers(variant, replicas)
        position = -(-space.n_bytes // 128) * 128
        segments = position + (
            variant.position_groups * variant.group_tiles * 32 * POSITION_FRAGMENT_BYTES
        )
        n_listed = LISTED_SEGMENTS if len(variant.tiers) > 1 else 0
        scratch = segments + n_listed * SEGMENT_BYTES
        room = (limit - scratch - fixed) // (fragments * 16)
        n_buffers = min(variant.n_warps, room)
        if n_buffers >= 1 and (n_buffers >= 4 or replicas == 2):
            break
    else:
        raise PageError("the tables of these tiers do not fit into shared memory")
    scratch_bytes = max(n_buffers * fragments * 16, WEIGHT_PARTS * heads * 8)
    registers_first = sum(t.shape[0] for t in space.tables)
    rows = np.concatenate([*space.tables, np.stack([*space.registers, np.zeros(4, np.float16)])])
    name = "ada_logits" if variant.logits else "ada_decode"
    sources: tuple[str, ...] = DECODE_SOURCES
    if variant.reconstruct:
        name, sources = "reconstruct", ("reconstruct.cuh", "{dispatch}", "reconstruct.cu")
    texts = [
        _dispatch(cases, registers_first, variant.reconstruct)
        if source == "{dispatch}"
        else (CUDA_FOLDER / source).read_text()
        for source in (*COMMON_SOURCES, *sources)
    ]
    offsets = {
        "POSITION_OFFSET": position,
        "SEGMENTS_OFFSET": segments,
        "LISTED_SEGMENTS": n_listed,
        "SCRATCH_OFFSET": scratch,
        "N_BUFFERS": n_buffers,
    }
    preamble = _preamble(variant, capability, replicas, space, offsets, name)
    text = "\n".join([preamble, *texts])
    is_decode = not variant.logits and not variant.reconstruct
    shared = scratch + (scratch_bytes + fixed if is_decode else 0)
    return KernelSource(text, name, 32 * variant.n_warps, shared, fragments, rows)


def _place_tiers(variant: Variant, replicas: int) -> tuple[_TableSpace, list[str]]:
    """Tables of all tiers and the statement that runs each tier."""
    space = _TableSpace(replicas)
    cases = []
    for tier in variant.tiers:
        if variant.reconstruct and tier.kind != "spherical":
            raise PageError(f"tier {tier.name!r}: only spherical tiers are reconstructed")
        if tier.kind == "dense":
            cases.append("run_row_pages<DenseRow>(state, segment, p, lane, warp, offset);")
        elif tier.kind == "int8":
            cases.append("run_row_pages<Int8Row>(state, segment, p, lane, warp, offset);")
        else:
            key, key_row = _place_format(tier.key_format, space)
            value, value_row = _place_format(tier.value_format, space)
            rows = (
                f"p.tables + REGISTER_ROW + {key_row}), __ldg(p.tables + REGISTER_ROW + {value_row}"
            )
            if variant.reconstruct:
                run = f"reconstruct_pages<{key}, {value}>(p, segment, lane, warp, __ldg({rows}));"
            else:
                run = (
                    f"run_spherical<{key}, {value}>(state, segment, p, lane, warp,"
                    f" __ldg({rows}), offset);"
                )
            cases.append(run)
    return space, cases


def _place_format(region: RegionFormat, space: _TableSpace) -> tuple[str, int]:
    """C++ type of a spherical region's decode and its row of registers."""
    assert not isinstance(region, str)
    layout = native_layout_of(region)
    if layout is None or region.pairing != "adjacent":
        raise PageError(
            f"code {region.name!r} has no native layout: the CUDA kernel reads depth-4 codes with "
            "adjacent pairs of the widths in LAYOUT.md; use the reference backend for this one"
        )
    tables = code_tables(region, layout)
    offsets = [space.place(table) for table in tables.shared]
    space.registers.append(tables.registers)
    arguments = ", ".join(str(offset) for offset in offsets)
    return f"{_SCHEME_CLASS[layout.scheme]}<{arguments}>", len(space.registers) - 1


def _preamble(
    variant: Variant,
    capability: int,
    replicas: int,
    space: _TableSpace,
    offsets: dict[str, int],
    name: str,
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
        "REPLICAS": replicas,
        # Shared memory starts after 1 KB that sm_90 reserves; the kernel traps if it does not.
        "SHARED_BASE": 1024 if capability >= 90 else 0,
        "SOFTCAP": int(variant.softcap),
        "WINDOW": int(variant.window),
        "LOGITS": int(variant.logits),
        "ANY_VALUE_NORM": int(any(has_norm(tier) for tier in variant.tiers)),
        "TILE_UNITS": variant.tile_units,
        "SCORE_CHAINS": variant.score_chains,
        "SMALL_PAGES": int(variant.small_pages),
        "PREFETCH": int(variant.prefetch),
        "N_TABLES": len(space.tables),
        "N_TABLE_ROWS": sum(t.shape[0] for t in space.tables),
        "WEIGHT_PARTS": WEIGHT_PARTS,
        "POSITION_GROUPS": variant.position_groups,
        "POSITION_BYTES": variant.position_bytes,
        **offsets,
        "KERNEL_NAME": name,
    }

    def array(name: str, values: list[int]) -> str:
        return (
            f"static constexpr __device__ int {name}[] = {{{', '.join(map(str, values)) or '0'}}};"
        )

    return "\n".join(
        [
            *(f"#define {key} {value}" for key, value in constants.items()),
            array("TABLE_FIRST_ROW", space.first_rows),
            array("TABLE_OFFSET", space.offsets),
        ]
    )


def _dispatch(cases: list[str], register_row: int, reconstruct: bool) -> str:
    body = "\n".join(f"    case {index}: {case} break;" for index, case in enumerate(cases))
    if reconstruct:
        signature = (
            "reconstruct_tier(const Params& p, const Segment& segment, const Lane& lane, u32 warp)"
        )
    else:
        signature = """run_tier(State& state, const Segment& segment, const Params& p,
    const Lane& lane, u32 warp, const float (&offset)[GROUP_TILES][2])"""
    return f"""
// Warp-uniform: a segment has one tier.
constexpr int REGISTER_ROW = {register_row};
static __device__ __forceinline__ void {signature} {{
  switch (segment.tier) {{
{body}
    default: break;
  }}
}}
"""
