"""A plan covers every live page once, whatever the cut, and never names a dead slot."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.benchmark import TokenOrder, with_positions
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.page_cost import memory_speed, page_costs
from sphkv_kernels.page_positions import PagePositions
from sphkv_kernels.page_table import PageTable
from sphkv_kernels.pages import page_bytes
from sphkv_kernels.plan import FIELDS, FIRST, FIRST_PAGES, LAST, TAIL, DecodePlan, make_plan
from sphkv_kernels.synthetic import tiled_cache
from sphkv_kernels.tier import PageError, TierFormat
from tests.kernels.cases import native_tiers


def empty_pages(counts: list[list[int]], page_size: int = 16) -> PagedCache:
    """A cache of int8 and dense pages without contents; counts[row] = pages of each tier."""
    tiers = (TierFormat.int8(), TierFormat.dense())
    flat = [tier for row in counts for tier, n in enumerate(row) for _ in range(n)]
    sizes = np.array([2 * (page_size * 64 + 2 * page_size), 2 * page_size * 128])
    n_bytes = sizes[flat] if flat else np.zeros(0, dtype=np.int64)
    starts = np.cumsum([0, *(sum(row) for row in counts)])
    table = PageTable(
        offsets=torch.from_numpy(np.cumsum(n_bytes) - n_bytes),
        tiers=torch.tensor(flat, dtype=torch.int8),
        live_tokens=torch.full((len(flat),), page_size, dtype=torch.int16),
        starts=torch.from_numpy(starts.astype(np.int32)),
    )
    pool = torch.zeros(int(n_bytes.sum()), dtype=torch.uint8)
    return PagedCache(tiers, page_size, len(counts), 1, 64, pool, table)


def segments_of(plan: DecodePlan) -> list[list[list[int]]]:
    """Per block its segments, in order, without the places of their pages."""
    others = plan.segments[:, :FIELDS].tolist()
    return [
        [head[:FIELDS], *others[slice(*head[FIELDS : FIELDS + 2])]]
        if head[4]
        else others[slice(*head[FIELDS : FIELDS + 2])]
        for head in plan.heads.tolist()
    ]


@pytest.mark.parametrize("n_blocks", [1, 3, 8])
def test_a_segment_says_where_its_first_pages_lie(n_blocks: int) -> None:
    plan = make_plan(empty_pages([[3, 40], [0, 0], [1, 90]]), n_blocks)
    records = plan.records[:, 0].tolist()
    heads = torch.cat([plan.heads[:, :FIELDS], plan.heads[:, FIELDS + 4 :]], dim=1)
    for segment in [*heads.tolist(), *plan.segments.tolist()]:
        first, n_pages = segment[2], segment[3]
        places = records[first : first + n_pages][:FIRST_PAGES] or [0]
        assert segment[FIELDS:] == places + places[-1:] * (FIRST_PAGES - len(places))


@pytest.mark.parametrize("n_blocks", [1, 3, 8, 20])
def test_a_block_knows_the_second_code_that_it_reads(n_blocks: int) -> None:
    """int8 and dense, which have no tables, do not take its place."""
    tiers = native_tiers(64)[:6]
    pages = torch.randint(-1, 6, (3, 2, 30), generator=torch.Generator().manual_seed(1))
    pages[1, 0] = -1
    plan = make_plan(tiled_cache(tiers, pages, 32, 2, 64, n_distinct=2, device="cpu"), n_blocks)
    is_code = [tiers[index].kind == "spherical" for index in plan.used_tiers]
    seconds = plan.heads[:, FIELDS + 2].tolist()
    for block, second in zip(segments_of(plan), seconds, strict=True):
        read = [segment[1] for segment in block]
        codes = [tier for tier in read if tier >= 0 and tier != read[0] and is_code[tier]]
        assert second == (codes[0] if codes else -1)
    assert max(seconds) >= 0


def test_a_record_is_that_of_its_entry() -> None:
    cache = empty_pages([[3, 400], [60, 340], [0, 1]])
    table = cache.page_table
    live = (torch.arange(table.n_entries) * 7 % 17).to(torch.int16)  # some dead, most partial
    plan = make_plan(replace(cache, page_table=replace(table, live_tokens=live)), 8)
    entries = plan.entries.long()
    assert entries.sort().values.tolist() == torch.nonzero(live).flatten().tolist()
    assert entries.tolist() != entries.sort().values.tolist()
    assert torch.equal(16 * plan.records[:, 0].long(), table.offsets[entries])
    assert torch.equal(plan.records[:, 1].long(), live[entries].long())


def test_blocks_that_share_a_row_read_its_pages_in_turn() -> None:
    cache = empty_pages([[0, 400], [60, 340]])
    plan = make_plan(cache, 8)
    entries, first_of = plan.entries.numpy(), {0: [0, 0, 400], 1: [400, 460, 800]}
    shares: dict[tuple[int, int], list[list[int]]] = {}
    for block in segments_of(plan):
        for row, tier, first, n_pages, *_ in block:
            shares.setdefault((row, tier), []).append(entries[first : first + n_pages].tolist())
    assert len(shares[0, 1]) == 4
    for (row, tier), found in shares.items():
        first, after = first_of[row][tier : tier + 2]
        assert sorted(page for pages in found for page in pages) == list(range(first, after))
        for pages in found:
            # A block that has read half of its pages has come to the middle of the run.
            done = (np.arange(len(pages)) + 0.5) / len(pages)
            place = (np.array(pages) + 0.5 - first) / (after - first)
            assert np.abs(done - place).max() <= 1.01 * len(found) / (after - first)


rows = st.lists(st.lists(st.integers(0, 40), min_size=2, max_size=2), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(rows, st.integers(1, 20))
def test_every_page_is_read_once_by_its_row_and_tier(
    counts: list[list[int]], n_blocks: int
) -> None:
    plan = make_plan(empty_pages(counts), n_blocks)
    seen = np.zeros((len(counts), 2), dtype=np.int64)
    pages: list[int] = []
    for block in segments_of(plan):
        for row, tier, first, n_pages, *_ in block:
            pages += range(first, first + n_pages)
            if n_pages:
                seen[row, plan.used_tiers[tier]] += n_pages
    assert sorted(pages) == list(range(len(pages)))
    assert seen.tolist() == counts


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint16])
def test_a_page_of_tokens_that_follow_one_another_is_known_by_its_first(dtype: torch.dtype) -> None:
    cache = empty_pages([[2, 1], [1, 0]])
    positions = 16 * torch.tensor([[0], [4094], [7], [3]]) + torch.arange(16)
    live = torch.tensor([16, 16, 1, 5], dtype=torch.int16)
    cache = replace(cache, page_table=replace(cache.page_table, live_tokens=live))
    positions[2, 1:] = 0xFFFF  # dead rows hold anything
    positions[3, 5:] = 9
    found = make_plan(replace(cache, positions=positions.to(dtype)), 3).positions
    assert found is not None and found.first.dtype == torch.int32
    assert found.first.tolist() == [0, 65504, 112, 48]
    assert found.offsets is None and found.offset_bytes == 0 and found.near
    positions[3, 4] += 1
    found = make_plan(replace(cache, positions=positions.to(dtype)), 3).positions
    assert found is not None and found.offsets is not None
    assert make_plan(cache, 3).positions is None


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint16])
def test_a_page_with_gaps_is_known_by_its_lowest_position_and_offsets(
    dtype: torch.dtype, page_size: int
) -> None:
    cache = replace(empty_pages([[1, 1]]), page_size=page_size)
    live = torch.tensor([page_size, 3], dtype=torch.int16)
    cache = replace(cache, page_table=replace(cache.page_table, live_tokens=live))
    slots = torch.arange(page_size)
    positions = torch.stack([65535 - 3 * slots, torch.full((page_size,), 0xFFFF)])
    positions[1, :3] = torch.tensor([9, 7, 4102])

    def found(positions: torch.Tensor) -> PagePositions:
        made = make_plan(replace(cache, positions=positions.to(dtype)), 3, check=False).positions
        assert made is not None and made.offsets is not None
        return made

    one = found(positions)
    assert one.offsets is not None and one.offsets.dtype == torch.uint16 and one.near
    assert one.first.tolist() == [65535 - 3 * (page_size - 1), 7]
    assert one.n_bytes == 2 * 4 + 2 * 2 * page_size
    order = 16 * (slots // 16) + 2 * (slots % 8) + slots % 16 // 8
    offsets = one.offsets.to(torch.int32)[:, order]
    assert torch.equal(offsets[0], 3 * (page_size - 1 - slots).to(torch.int32))
    assert offsets[1, :3].tolist() == [2, 0, 4095]
    positions[1, 2] += 1
    assert not found(positions).near
    if dtype == torch.int32:
        positions[1, 2] += 65535
        far = found(positions)
        assert far.offsets is not None and far.offset_bytes == 4 and not far.near
        assert far.offsets[1, order][:3].tolist() == [2, 0, 4096 + 65535]


@pytest.mark.parametrize(
    ("n_tokens", "order", "offset_bytes", "near"),
    [
        (96, "runs", 0, True), (96, "gaps", 2, True), (96, "spread", 2, True),
        (30_000, "spread", 2, False), (200_000, "spread", 4, False),
    ],
)  # fmt: skip
def test_every_order_of_the_benchmark_meets_its_kernel(
    n_tokens: int, order: TokenOrder, offset_bytes: int, near: bool
) -> None:
    cache = with_positions(empty_pages([[3], [3]]), n_tokens, order)
    assert cache.positions is not None
    assert cache.positions.to(torch.int32).unique().numel() == 6 * 16
    found = make_plan(cache, 3).positions
    assert found is not None and (found.offset_bytes, found.near) == (offset_bytes, near)


@settings(max_examples=60, deadline=None)
@given(rows, st.integers(1, 20))
def test_parts_of_a_row_are_numbered_and_one_takes_the_tail(
    counts: list[list[int]], n_blocks: int
) -> None:
    plan = make_plan(empty_pages(counts), n_blocks)
    parts: dict[int, list[int]] = {row: [] for row in range(len(counts))}
    tails = dict.fromkeys(parts, 0)
    slots: list[int] = []
    for block in segments_of(plan):
        current = None
        for row, _, _, _, flags, part, n_parts, base in block:
            assert bool(flags & FIRST) == (current != row)
            current = None if flags & LAST else row
            tails[row] += bool(flags & TAIL)
            if flags & LAST:
                parts[row].append(part)
                if n_parts > 1:
                    slots.append(base + part)
        assert current is None
    for row, found in parts.items():
        assert sorted(found) == list(range(len(found))), row
        assert tails[row] == 1
    assert sorted(slots) == list(range(plan.n_parts))


def test_shares_end_with_rows_where_a_second_part_would_cost_more() -> None:
    plan = make_plan(empty_pages([[0, 640]] * 8), 33)
    assert all(len(block) <= 1 for block in segments_of(plan))
    assert plan.n_parts == 32


def test_one_long_row_is_spread_over_all_blocks() -> None:
    plan = make_plan(empty_pages([[0, 6400], [0, 1]]), 33)
    per_block = [sum(segment[3] for segment in block) for block in segments_of(plan)]
    assert max(per_block) <= 2 * 6401 / 33


def test_dead_slots_and_broken_tables_never_reach_a_plan() -> None:
    cache = empty_pages([[2, 2]])
    table = cache.page_table
    live, offsets = table.live_tokens.clone(), table.offsets.clone()
    live[1], offsets[1] = 0, 1 << 60
    dead = replace(cache, page_table=replace(table, live_tokens=live, offsets=offsets))
    assert 1 not in make_plan(dead, 3).entries.tolist()
    broken = replace(cache, page_table=replace(table, offsets=offsets))
    with pytest.raises(PageError, match="inside the pool"):
        make_plan(broken, 3)


def test_blocks_of_a_mixed_cache_share_time_and_not_bytes() -> None:
    """One row of many pages in three tiers of very different cost per byte."""
    codes = [
        SphericalCode.analytic(f"c{i}", 128, bits, radius)
        for i, (bits, radius) in enumerate([((4, 2, 2, 2), "fp16"), ((3, 1, 1, 1), "lloyd_max:1")])
    ]
    tiers = (*map(TierFormat.spherical, codes), TierFormat.int8())
    counts = [600, 600, 300]
    flat = np.repeat([0, 1, 2], counts)
    sizes = np.array([page_bytes(tier, 128, 32) for tier in tiers])[flat]
    table = PageTable(
        offsets=torch.from_numpy(np.cumsum(sizes) - sizes),
        tiers=torch.from_numpy(flat.astype(np.int8)),
        live_tokens=torch.full((flat.size,), 32, dtype=torch.int16),
        starts=torch.tensor([0, flat.size], dtype=torch.int32),
    )
    pool = torch.zeros(int(sizes.sum()), dtype=torch.uint8)
    cache = PagedCache(tiers, 32, 1, 1, 128, pool, table)
    costs, memory_binds = page_costs(cache, counts)
    assert not memory_binds and page_costs(cache, [600, 0, 0])[1]
    assert page_costs(cache, [0, 0, 300])[1] and not page_costs(cache, [0, 600, 0])[1]
    # Memory of twice the speed: rows take half as long, codes as long, and it binds no more.
    fast, still_binds = page_costs(cache, [0, 600, 300], 2.0)
    slow, _ = page_costs(cache, [0, 600, 300])
    assert not still_binds and not page_costs(cache, [600, 0, 0], 2.0)[1]
    assert all(
        abs(slow[i] - fast[i] * (2 if tier.kind == "int8" else 1)) <= 1
        for i, tier in enumerate(cache.tiers)
    )
    # A code of half the bytes is not half the time: its instructions bind it.
    assert costs[1] / costs[0] > 1.3 * page_bytes(tiers[1], 128, 32) / page_bytes(tiers[0], 128, 32)
    per_block = [
        sum(costs[plan_tier] * n_pages for _, plan_tier, _, n_pages, *_ in block)
        for block in segments_of(make_plan(cache, 10))
    ]
    assert max(per_block) <= 1.03 * sum(per_block) / 10


@pytest.mark.parametrize(
    ("clock", "bits", "core_clock", "speed"),
    [
        (2_619_000, 5120, 1_980_000, 1.0), (3_201_000, 6016, 1_980_000, 1.44),
        (0, 5120, 1_980_000, 1.0), (2_619_000, 0, 1_980_000, 1.0), (2_619_000, 5120, 0, 1.0),
    ],
)  # fmt: skip
def test_memory_speed_is_that_of_the_device_where_it_says(
    clock: int, bits: int, core_clock: int, speed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(
        memory_clock_rate=clock, memory_bus_width=bits, clock_rate=core_clock,
        multi_processor_count=132,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert memory_speed(torch.device("cuda")) == pytest.approx(speed, abs=0.005)
    assert memory_speed(torch.device("cpu")) == 1.0


@pytest.mark.parametrize(("head_dim", "measured"), [(64, 2.08), (128, 2.56), (256, 2.61)])
def test_a_page_of_rows_costs_as_much_more_than_one_of_codes_as_measured(
    head_dim: int, measured: float
) -> None:
    """H100, each tier alone: 106, 148 and 148 us for 3/2/2/2 r2, 220, 379 and 385 us for int8."""
    code = SphericalCode.analytic("code", head_dim, (3, 2, 2, 2), "lloyd_max:2")
    cache = replace(
        empty_pages([[1, 1]]),
        tiers=(TierFormat.spherical(code), TierFormat.int8()),
        page_size=32,
        head_dim=head_dim,
    )
    (of_code, of_rows), _ = page_costs(cache, [100, 100])
    assert of_rows / of_code == pytest.approx(measured, rel=0.06)


def test_a_head_dim_that_the_kernel_does_not_have_is_named() -> None:
    with pytest.raises(PageError, match="head_dim 96: the CUDA kernel has \\(64, 128, 256\\)"):
        make_plan(replace(empty_pages([[1, 1]]), head_dim=96), 3, check=False)


@pytest.mark.parametrize(("bits", "radius", "splits"), [
    ((4, 2, 2, 2), "fp16", False), ((3, 2, 2, 2), "lloyd_max:2", True)
])  # fmt: skip
def test_rows_are_split_for_less_where_instructions_bind(
    bits: tuple[int, ...], radius: str, splits: bool
) -> None:
    """Five rows on sixteen blocks: a cut anywhere promises 6 %, which memory would not keep."""
    tier = TierFormat.spherical(SphericalCode.analytic("code", 128, bits, radius))
    n_rows, n_pages = 5, 60_000
    n = n_rows * n_pages
    table = PageTable(
        offsets=torch.zeros(n, dtype=torch.int64),
        tiers=torch.zeros(n, dtype=torch.int8),
        live_tokens=torch.full((n,), 32, dtype=torch.int16),
        starts=n_pages * torch.arange(n_rows + 1, dtype=torch.int32),
    )
    pool = torch.zeros(page_bytes(tier, 128, 32), dtype=torch.uint8)  # every page is the same
    plan = make_plan(PagedCache((tier,), 32, n_rows, 1, 128, pool, table), 16, check=False)
    rows_of_block = [len({segment[0] for segment in block}) for block in segments_of(plan)]
    assert (max(rows_of_block) == 2) == splits
    assert plan.n_parts == (16 + 4 if splits else 15)
