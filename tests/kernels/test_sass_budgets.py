"""The decode loop keeps its instruction budget on a machine without a GPU.

A budget is what the recorded kernel needs per 32 tokens of K and V and one warp (head_dim 128),
with a few per cent of room: a change that costs more shows here before it shows in a benchmark.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sphkv_kernels.variant as variant_module
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.build import compile_cubin
from sphkv_kernels.tier import PageError, TierFormat
from sphkv_kernels.variant import Variant, kernel_source
from tests.kernels.cases import native_tiers
from tests.kernels.sass import (
    LoopStatistics,
    built,
    decode_loop,
    decode_loops,
    disassemble,
    disassembler,
    registers_of,
    row_loops,
)

needs_tools = pytest.mark.skipif(
    disassembler("nvdisasm") is None or disassembler("cuobjdump") is None,
    reason="the nvidia-cuda-nvdisasm and -cuobjdump wheels (extra `test`) are not installed",
)
pytest.importorskip("cuda.core", reason="cuda-core (extra `cuda`) is not installed")


def tier_of(bits: tuple[int, ...], radius: str, head_dim: int = 128) -> TierFormat:
    return TierFormat.spherical(SphericalCode.analytic("code", head_dim, bits, radius))


def loop_and_registers(
    tmp_path: Path, variant: Variant, capability: int
) -> tuple[LoopStatistics, int]:
    cubin = built(variant, capability, tmp_path)
    return decode_loop(disassemble(cubin)), registers_of(cubin)


# (bits, radius): lookups, half2 products and all instructions of the loop, rare branches included.
BUDGETS = {
    ((4, 2, 2, 2), "fp16"): (96, 192, 765),
    ((4, 2, 2, 2), "lloyd_max:2"): (96, 128, 775),
    ((4, 3, 3, 3), "minifloat:5,6"): (112, 208, 880),
    ((3, 2, 2, 2), "lloyd_max:2"): (80, 128, 710),
}


@needs_tools
@pytest.mark.parametrize(("code", "budget"), BUDGETS.items(), ids=str)
def test_decode_loop_keeps_its_budget(
    code: tuple[tuple[int, ...], str], budget: tuple[int, int, int], tmp_path: Path
) -> None:
    loop, registers = loop_and_registers(tmp_path, Variant((tier_of(*code),), 128, 1), 90)
    lookups, products, total = budget
    assert loop.local_memory == 0
    assert registers <= 168
    assert loop.instructions["LDS"] == lookups
    assert loop.instructions["HMUL2"] == products
    assert loop.instructions["HMMA"] == 48
    assert loop.total <= total
    # A load is waited for a quarter of a tile later at the soonest: in L2 it is there by then.
    assert loop.load_distance >= 150


# (bits, radius), heads of the tables: half2 products and fused products, matrix products, all.
TABLE_BUDGETS = {
    ((4, 2, 2, 2), "fp16", 1): (112 + 24, 34, 715),
    ((4, 2, 2, 2), "fp16", 2): (128 + 48, 36, 760),
    ((3, 2, 2, 2), "lloyd_max:2", 1): (72 + 24, 34, 680),
    ((3, 2, 2, 2), "lloyd_max:2", 2): (72 + 24, 34, 680),
}


@needs_tools
@pytest.mark.parametrize(("code", "budget"), TABLE_BUDGETS.items(), ids=str)
def test_scores_by_table_keep_their_budget(
    code: tuple[tuple[int, ...], str, int], budget: tuple[int, int, int], tmp_path: Path
) -> None:
    bits, radius, heads = code
    variant = Variant((tier_of(bits, radius),), 128, 1, table_heads=heads)
    loop, registers = loop_and_registers(tmp_path, variant, 90)
    products, matrix_products, total = budget
    assert loop.local_memory == 0
    assert registers <= 168
    assert loop.instructions["HMUL2"] + loop.instructions["HFMA2"] == products
    assert loop.instructions["HMMA"] == matrix_products
    assert loop.total <= total
    assert loop.load_distance >= 150


@needs_tools
@pytest.mark.parametrize(
    ("head_dim", "group_tiles", "capability"),
    [(128, 1, 80), (64, 1, 90), (128, 2, 90), (128, 1, 100), (64, 1, 120)],
)
def test_other_shapes_build_without_spills_in_the_loop(
    head_dim: int, group_tiles: int, capability: int, tmp_path: Path
) -> None:
    tier = tier_of((4, 2, 2, 2), "fp16", head_dim)
    n_warps = 12 if group_tiles == 1 else 8
    variant = Variant((tier,), head_dim, group_tiles, n_warps=n_warps)
    loop, _ = loop_and_registers(tmp_path, variant, capability)
    assert loop.local_memory == 0


@needs_tools
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_shared_memory_begins_where_lookups_take_it_to(capability: int, tmp_path: Path) -> None:
    """A kernel that finds it elsewhere traps; before sm_90 the assembler knows and leaves nothing
    but the trap, from there on it compares its own address with the kernel's."""
    variant = Variant((tier_of((4, 2, 2, 2), "fp16"),), 128, 1)
    text = "\n".join(disassemble(built(variant, capability, tmp_path)))
    if capability < 90:
        assert "BPT.TRAP" not in text
    else:
        start = text[: text.index("BPT.TRAP")]
        assert re.search(r"U?MOV U?R\d+, 0x400 ;", start)
        assert re.search(r"U?ISETP.NE.AND .*, 0x400,", start)


@needs_tools
@pytest.mark.parametrize(
    ("groups", "offset_bytes", "near", "more"),
    [
        (1, 0, True, 40),
        (2, 0, True, 70),
        (1, 2, True, 80),
        (2, 2, True, 125),
        (2, 2, False, 135),
        (2, 4, False, 140),
    ],
)
def test_position_term_keeps_its_budget(
    groups: int, offset_bytes: int, near: bool, more: int, tmp_path: Path
) -> None:
    tier = tier_of((3, 2, 2, 2), "lloyd_max:2")
    variant = Variant(
        (tier,), 128, 1, position_groups=groups, offset_bytes=offset_bytes, near_offsets=near
    )
    loop, registers = loop_and_registers(tmp_path, variant, 90)
    assert loop.local_memory == 0
    assert registers <= 168
    assert loop.instructions["HMMA"] == 48 + (4 if groups == 1 else 6)
    assert loop.load_distance >= 150
    assert loop.total <= 685 + more


@needs_tools
def test_rows_keep_their_budget(tmp_path: Path) -> None:
    """16 tokens of int8, and of the dense tail, which is longer: keys and values are asked for
    together, and with them where the next ones lie."""
    cubin = built(Variant((TierFormat.int8(),), 128, 1), 90, tmp_path)
    int8, dense = row_loops(disassemble(cubin))
    for loop, loads, total in ((int8, 8 + 2 + 1, 480), (dense, 16, 510)):
        assert loop.local_memory == 0
        assert loop.instructions["HMMA"] == 24
        assert loop.instructions["LDG"] == loads
        assert loop.loads_first
        assert loop.total <= total


@needs_tools
def test_mixed_tiers_and_logits_build(tmp_path: Path) -> None:
    tiers = (
        TierFormat.int8(),
        TierFormat.dense(),
        tier_of((4, 2, 2, 2), "lloyd_max:2"),
        tier_of((3, 2, 2, 2), "lloyd_max:2"),
    )
    loops = decode_loops(disassemble(built(Variant(tiers, 128, 1), 90, tmp_path)))
    assert len(loops) == 2
    for loop in loops:
        assert loop.local_memory == 0
        assert loop.load_distance >= 150
    source = kernel_source(Variant(tiers, 128, 1, logits=True, window=True), 90)
    assert compile_cubin(source.text, 90, folder=tmp_path)


# Loops of 3/1/1/1, 3/2/2/2, 4/2/2/2, 4/3/3/3 and 5/3/3/3, shortest first, as in a real plan.
SIX_TIERS = {64: (605, 610, 705, 715, 725), 128: (705, 710, 905, 915, 920)}


@needs_tools
@pytest.mark.parametrize(("head_dim", "budgets"), SIX_TIERS.items(), ids=str)
def test_tables_of_many_tiers_take_turns_at_full_copies(
    head_dim: int, budgets: tuple[int, ...], tmp_path: Path
) -> None:
    """Fewer copies would make lanes of a warp wait for each other in every lookup."""
    codes = (
        ((3, 1, 1, 1), "lloyd_max:1"),
        ((3, 2, 2, 2), "lloyd_max:2"),
        ((4, 2, 2, 2), "lloyd_max:2"),
        ((4, 3, 3, 3), "lloyd_max:3"),
        ((5, 3, 3, 3), "lloyd_max:3"),
    )
    tiers = (*(tier_of(*code, head_dim) for code in codes), TierFormat.int8())
    variant = Variant(tiers, head_dim, 1)
    text = kernel_source(variant, 90).text
    assert "#define REPLICAS 16\n" in text
    assert "#define TABLE_SETS 6\n" in text
    loops = decode_loops(disassemble(built(variant, 90, tmp_path)))
    assert len(loops) == len(budgets)
    for loop, total in zip(sorted(loops, key=lambda one: one.total), budgets, strict=True):
        assert loop.total <= total
    # 5/3/3/3 spilled these before there were sets; bringing them in adds none.
    assert sum(loop.local_memory for loop in loops) <= 10


def test_what_does_not_fit_is_said() -> None:
    variant = Variant(native_tiers(256)[:9], 256, 2, n_warps=8, position_groups=32)
    with pytest.raises(PageError, match=r"9 tiers with 128 RoPE pairs .* 99 KB .* 8\.9"):
        kernel_source(variant, 89)
    kernel_source(variant, 90)


@needs_tools
@pytest.mark.parametrize("capability", [86, 89, 120])
@pytest.mark.parametrize(
    ("radius", "total"), [("lloyd_max:3", 980), ("minifloat:5,6", 920)], ids=str
)
def test_large_tables_are_split_where_shared_memory_is_small(
    radius: str, total: int, capability: int, tmp_path: Path
) -> None:
    variant = Variant((tier_of((4, 3, 3, 3), radius),), 128, 1)
    text = kernel_source(variant, capability).text
    assert "#define SPLIT_ROWS 1\n" in text
    assert "#define REPLICAS 8\n" in text
    loop, registers = loop_and_registers(tmp_path, variant, capability)
    assert loop.local_memory == 0
    assert registers <= 168
    assert loop.total <= total


def test_query_tables_fit_beside_two_codes_and_a_position_term() -> None:
    """Sums of one warp at a time are room enough."""
    tiers = (tier_of((4, 2, 2, 2), "fp16"), tier_of((4, 3, 3, 3), "lloyd_max:3"))
    source = kernel_source(
        Variant(tiers, 128, 1, table_heads=1, position_groups=4, offset_bytes=2), 90
    )
    assert "#define N_BUFFERS 1\n" in source.text


@needs_tools
def test_features_of_runs_are_left_out_where_they_leave_no_room(tmp_path: Path) -> None:
    tier = tier_of((4, 2, 2, 2), "fp16")
    variant = Variant((tier,), 128, 2, n_warps=8, position_groups=32)
    roomy = kernel_source(variant, 90)
    assert "#define POSITION_RUNS 1" in roomy.text
    narrow = kernel_source(variant, 86)
    assert "#define POSITION_RUNS 0" in narrow.text
    assert compile_cubin(narrow.text, 86, folder=tmp_path)


def table_copies(variant: Variant, capability: int) -> str:
    """How many copies of how many rows of tables a kernel has room for."""
    text = kernel_source(variant, capability).text
    found = re.search(r"#define REPLICAS (\d+)", text)
    rows = re.search(r"#define N_TABLE_ROWS (\d+)", text)
    assert found and rows
    return f"{found[1]} copies of {rows[1]} rows"


@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("group_tiles", [1, 2])
def test_features_of_runs_never_take_the_place_of_tables(group_tiles: int, capability: int) -> None:
    def copies(groups: int, features: int) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(variant_module, "RUN_FEATURE_BYTES", features)
            variant = Variant((tier,), 128, group_tiles, n_warps=8, position_groups=groups)
            return table_copies(variant, capability)

    for code in (((4, 2, 2, 2), "lloyd_max:2"), ((4, 2, 2, 2), "fp16")):
        tier = tier_of(*code)
        for groups in (1, 4, 16):
            assert copies(groups, variant_module.RUN_FEATURE_BYTES) == copies(groups, 0)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_list_of_segments_never_takes_the_place_of_tables(
    head_dim: int, capability: int
) -> None:
    codes = {
        "a": ((3, 2, 2, 2), "lloyd_max:2"),
        "b": ((4, 2, 2, 2), "lloyd_max:2"),
        "c": ((4, 3, 3, 3), "lloyd_max:3"),
        "d": ((5, 3, 3, 3), "lloyd_max:3"),
    }
    for names in ("ab", "ac", "abc", "cd"):
        tiers = (*(tier_of(*codes[name], head_dim) for name in names), TierFormat.int8())
        variant = Variant(tiers, head_dim, 1, n_warps=8 if head_dim == 256 else 12)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(variant_module, "LISTED_SEGMENTS", (0,))
            without = table_copies(variant, capability)
        assert table_copies(variant, capability) == without
