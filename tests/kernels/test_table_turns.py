"""Kernels of many tiers: whenever a block reads a code, its tables are where lookups find them.

What `cuda/tables.cuh` and the loop of `cuda/decode.cu` do with sets is followed here step by step,
over plans of the planner, from the very numbers that the source is given.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.block_words import native_layout_of
from sphkv_kernels.lookup_tables import code_tables
from sphkv_kernels.plan import FIELDS, make_plan
from sphkv_kernels.synthetic import tiled_cache
from sphkv_kernels.tier import TierFormat
from sphkv_kernels.variant import KernelSource, Variant, kernel_source
from tests.kernels.cases import native_tiers


class Block:
    """Shared memory of one block: which compact row lies at which place."""

    def __init__(self, source: KernelSource) -> None:
        def numbers(name: str) -> list[int]:
            found = re.search(rf" {name}\[\] = {{(.*?)}};", source.text)
            assert found is not None
            return [int(number.rstrip("u")) for number in found[1].split(", ")]

        self.first, self.n_rows = numbers("SET_FIRST_ROW"), numbers("SET_ROWS")
        self.overwritten = numbers("SETS_OVERWRITTEN")
        self.copy_bytes = 8 * constant(source, "REPLICAS")
        places = source.table_rows[constant(source, "PLACES_ROW") :].ravel().view(np.uint32)
        self.places = places[: sum(self.n_rows)].tolist()
        self.present = 0
        self.memory: dict[int, int] = {}

    def bring(self, tier: int, also: int) -> None:
        """`bring_tables`."""
        own = self.overwritten[tier] if tier >= 0 else 0
        if also >= 0 and own >> also & 1:
            also = -1
        gone = own | (self.overwritten[also] if also >= 0 else 0)
        for one in (tier, also):
            if one >= 0:
                for row in range(self.first[one], self.first[one] + self.n_rows[one]):
                    self.memory[self.places[row] // self.copy_bytes] = row
        bits = sum({1 << one for one in (tier, also) if one >= 0})
        self.present = self.present & ~gone | bits

    def holds(self, tier: int) -> bool:
        """Whether every row of a tier's tables is in its place."""
        rows = range(self.first[tier], self.first[tier] + self.n_rows[tier])
        return all(self.memory.get(self.places[row] // self.copy_bytes) == row for row in rows)


def constant(source: KernelSource, name: str) -> int:
    found = re.search(rf"#define {name} (\d+)", source.text)
    assert found is not None
    return int(found[1])


def tiers_of(head_dim: int, capability: int) -> tuple[TierFormat, ...]:
    """int8, dense, the native codes, and two of two codes each where one alone has room."""
    native = native_tiers(head_dim)
    if capability < 90:
        return native[:9]
    codes = [tier.key_code for tier in native if tier.kind == "spherical"]
    mixed = (TierFormat(f"mixed {i}", "spherical", codes[i], codes[j]) for i, j in ((2, 5), (4, 0)))
    return (*native[:9], *mixed)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("group_tiles", [1, 2])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tables_are_there_when_they_are_read(
    head_dim: int, group_tiles: int, capability: int
) -> None:
    tiers = tiers_of(head_dim, capability)
    generator = torch.Generator().manual_seed(head_dim + group_tiles)
    pages = torch.randint(-1, len(tiers), (3, 2, 40), generator=generator)
    pages[1, 0] = -1  # a row without pages
    pages[2] = pages[2].clamp(max=1)  # rows of int8 and dense alone
    cache = tiled_cache(tiers, pages, 32, 2, head_dim, n_distinct=2, device="cpu")
    n_warps = 12 if group_tiles == 1 and head_dim < 256 else 8
    n_brought = 0
    for n_blocks in (1, 2, 5, 33, 132):
        plan = make_plan(cache, n_blocks)
        used = tuple(tiers[index] for index in plan.used_tiers)
        source = kernel_source(Variant(used, head_dim, group_tiles, n_warps=n_warps), capability)
        assert constant(source, "REPLICAS") == 16
        assert constant(source, "TABLE_SETS") == len(used)
        others = plan.segments.tolist()
        for head in plan.heads.tolist():
            block = Block(source)
            block.bring(head[1], head[FIELDS + 2])
            for segment in (head, *others[slice(*head[FIELDS : FIELDS + 2])]):
                tier = segment[1]
                if tier >= 0 and not block.present >> tier & 1:
                    block.bring(tier, -1)
                    n_brought += 1
                assert tier < 0 or block.holds(tier)
                assert all(block.holds(one) for one in range(len(used)) if block.present >> one & 1)
    assert n_brought > 10


@pytest.mark.parametrize("position_groups", [0, 4])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_no_region_of_shared_memory_lies_in_another(head_dim: int, position_groups: int) -> None:
    variant = Variant(tiers_of(head_dim, 90), head_dim, 1, position_groups=position_groups)
    source = kernel_source(variant, 90)
    names = ("POSITION", "SEGMENTS", "PRESENT", "TOTALS", "SCRATCH")
    starts = [constant(source, f"{name}_OFFSET") for name in names]
    block = Block(source)
    # The copies of a row end with the column that it begins in.
    tables = max(place - place % block.copy_bytes + block.copy_bytes for place in block.places)
    assert tables <= starts[0]
    assert starts == sorted(starts)
    assert starts[3] - starts[2] >= 4
    assert starts[2] - starts[1] == 128 * constant(source, "LISTED_SEGMENTS")
    heads, n_warps = 8, 12
    assert starts[4] - starts[3] >= (n_warps + 1) * heads * 8 + 4
    buffers = constant(source, "N_BUFFERS") * 16 * constant(source, "FRAGMENTS")
    assert starts[4] + buffers == source.shared_bytes


@pytest.mark.parametrize("capability", [89, 120])
@pytest.mark.parametrize("radius", ["lloyd_max:3", "minifloat:5,6"])
def test_split_tables_are_found_by_nine_bits(radius: str, capability: int) -> None:
    """`lookup_nine`: row 256 and on of the upper weights lie one column further."""
    code = SphericalCode.analytic("code", 128, (4, 3, 3, 3), radius)
    layout = native_layout_of(code)
    assert layout is not None
    source = kernel_source(Variant((TierFormat.spherical(code),), 128, 1), capability)
    assert constant(source, "SPLIT_ROWS") == 1
    copies = constant(source, "REPLICAS")
    firsts, places = (
        [int(x) for x in re.findall(r"-?\d+", found)]
        for found in re.findall(r" TABLE_(?:FIRST_ROW|OFFSET)\[\] = {(.*?)};", source.text)
    )
    # What `store_tables` writes: a compact row and its copies, 8 bytes each.
    memory = {}
    for first, place, after in zip(
        firsts, places, [*firsts[1:], constant(source, "N_TABLE_ROWS")], strict=True
    ):
        for row in range(first, after):
            for copy in range(copies):
                memory[place + 256 * (row - first) + 8 * copy] = source.table_rows[row]
    offsets = re.search(r"run_spherical<PairNine\w*<\d+, (\d+), \d+>", source.text)
    assert offsets is not None
    upper = code_tables(code, layout).shared[1]
    assert upper.shape[0] == 512
    shift = {16: 9, 8: 10, 4: 11, 2: 12}[copies]
    for row in range(512):
        for lane in (0, 5, 31):
            shifted = row << 8 | 0xABC20000 | 0x5A  # other fields of the word around it
            address = (shifted & 0xFF00) | lane % copies * 8 | shifted >> shift & 8 * copies
            assert (memory[int(offsets[1]) + address] == upper[row]).all()
    assert f"COLUMN == 64 ? {shift}" in source.text or copies != 8
