"""Slots that a seal revives are read as the plan would have read them from the start."""

from __future__ import annotations

import pytest
import torch

from sphkv_cli.generation import page_reserve
from sphkv_cli.generation.page_reserve import SlotMaker
from sphkv_kernels.cache import PagedCache, SequenceTokens, build_cache
from sphkv_kernels.page_positions import PagePositions
from sphkv_kernels.tier import TierFormat
from tests.kernels.cases import plan_without_kernels

N_HEADS, PAGE = 2, 16


def cache_of(n_tokens: int, step: int, dtype: torch.dtype) -> PagedCache:
    """One sequence of int8 pages, its tokens `step` positions apart."""
    keys, values = torch.zeros((2, n_tokens, N_HEADS, 64))
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
