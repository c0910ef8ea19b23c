"""Slots that a seal revives are read as the plan would have read them from the start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sphkv_cli.generation import page_reserve
from sphkv_cli.generation.page_reserve import PageReserve, SlotMaker
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.cache_builder import build_cache
from sphkv_kernels.page_positions import PagePositions
from sphkv_kernels.page_slots import SequenceTokens
from sphkv_kernels.tier import TierFormat
from tests.kernels.cases import plan_without_kernels

N_HEADS, PAGE = 2, 16


def cache_of(n_tokens: int, step: int, dtype: torch.dtype, seed: int = 0) -> PagedCache:
    """One sequence of int8 pages, its tokens `step` positions apart."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn((2, n_tokens, N_HEADS, 64), generator=generator)
    numbers = (torch.arange(n_tokens) // PAGE)[:, None].expand(-1, N_HEADS)
    positions = step * torch.arange(n_tokens)
    tokens = SequenceTokens(keys, values, torch.zeros_like(numbers), numbers, positions)
    return build_cache((TierFormat.int8(),), PAGE, [tokens], position_dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint16])
@pytest.mark.parametrize("step", [1, 3])
def test_revived_slots_have_their_positions(
    step: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_reserve, "plan", plan_without_kernels)
    cache = cache_of(40, step, dtype)
    reserve = SlotMaker(8).reserve(cache, 0, 4)
    assert reserve.plan is not None
    work = reserve.plan.work
    assert work.positions is not None
    assert (work.positions.offsets is None) == (step == 1)  # dead slots count as runs
    n_bytes = cache.tier_page_bytes()[0]
    pages = torch.ones((1, N_HEADS, 2, n_bytes), dtype=torch.uint8)
    reserve.fill(pages, [0], 3, 40 + torch.arange(2 * PAGE)[None])
    assert reserve.records is not None
    assert work.records[reserve.records[0, :, 3:5], 1].tolist() == [[PAGE, PAGE]] * N_HEADS
    found = work.positions.first[reserve.records[0, :, 3:5]]
    assert found.tolist() == [[40, 40 + PAGE]] * N_HEADS
    again = PagePositions.of(reserve.pages, work.entries)
    assert again is not None and torch.equal(again.first, work.positions.first)
    assert (again.offsets is None) == (step == 1)
    if again.offsets is not None and work.positions.offsets is not None:
        assert torch.equal(again.offsets.to(torch.int32), work.positions.offsets.to(torch.int32))


def with_dead_slots(seed: int) -> PagedCache:
    """Pages of a layer whose slots are used up by half: what new slots are made of."""
    cache = replace(cache_of(3 * PAGE, 1, torch.int32, seed), positions=None)
    reserve = SlotMaker(4).reserve(cache, 0, None)
    pages = torch.full((1, N_HEADS, 2, cache.tier_page_bytes()[0]), seed, dtype=torch.uint8)
    reserve.fill(pages, [0], 0, torch.arange(2 * PAGE)[None])
    return reserve.pages


def assert_same(found: PageReserve, expected: PageReserve) -> None:
    assert torch.equal(found.pages.pool, expected.pages.pool)
    for name in ("offsets", "tiers", "live_tokens", "starts"):
        of_both = (getattr(one.pages.page_table, name) for one in (found, expected))
        assert torch.equal(*of_both), name
    assert torch.equal(found.entries, expected.entries)
    found.block.fill_(7)
    expected.block.fill_(7)
    assert torch.equal(found.pages.pool, expected.pages.pool)


@pytest.mark.parametrize("has_dead_slots", [False, True])
def test_a_layer_laid_out_alike_has_its_own_bytes_and_the_table_of_the_other(
    has_dead_slots: bool,
) -> None:
    def layer(seed: int) -> PagedCache:
        if has_dead_slots:
            return with_dead_slots(seed)
        return replace(cache_of(3 * PAGE, 1, torch.int32, seed), positions=None)

    maker, layers = SlotMaker(5), [layer(seed) for seed in (1, 2, 3)]
    made = [maker.reserve(pages, 0, None) for pages in layers]
    assert [one.is_twin for one in made] == [False, True, True]
    for one, pages in zip(made, layers, strict=True):
        alone = SlotMaker(5).reserve(pages, 0, None)
        assert not alone.is_twin
        assert one.pages.page_table.n_entries == N_HEADS * (5 + 3 + 2 * has_dead_slots)
        assert_same(one, alone)
    assert made[1].pages.page_table is made[0].pages.page_table


def test_a_layer_laid_out_otherwise_is_no_twin() -> None:
    pages = with_dead_slots(1)
    pages = replace(pages, tiers=pages.tiers * 2)
    table = pages.page_table
    other_tiers, other_starts = table.tiers.clone(), table.starts.clone()
    other_tiers[1] = 1
    other_starts[1] -= 1
    fewer = table.live_tokens.clone()
    fewer[0] -= 1
    longer = torch.cat([pages.pool, pages.pool[:16]])
    following = torch.zeros((table.n_entries, PAGE), dtype=torch.int32)
    for other in (
        replace(pages, page_table=replace(table, live_tokens=fewer)),
        replace(pages, page_table=replace(table, offsets=table.offsets.flip(0))),
        replace(pages, page_table=replace(table, tiers=other_tiers)),
        replace(pages, page_table=replace(table, starts=other_starts)),
        replace(pages, pool=longer),
        replace(pages, positions=following),
    ):
        maker = SlotMaker(3)
        maker.reserve(pages, 0, None)
        found = maker.reserve(other, 0, None)
        assert not found.is_twin
        assert_same(found, SlotMaker(3).reserve(other, 0, None))
