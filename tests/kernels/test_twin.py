"""A plan lends its kernels to the cache of another layer only where they read it alike."""

from dataclasses import replace

import pytest
import torch

from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels import decode
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.cache_builder import build_cache
from sphkv_kernels.page_slots import SequenceTokens
from sphkv_kernels.tier import PageError, TierFormat
from sphkv_kernels.variant import Variant
from tests.kernels.cases import plan_without_kernels


def cache_of(tier: TierFormat, *, with_positions: bool = False) -> PagedCache:
    keys, values = (
        torch.randn((20, 2, 64), generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    )
    numbers = (torch.arange(20) // 16)[:, None].expand(-1, 2)
    positions = torch.arange(20) if with_positions else None
    tokens = SequenceTokens(keys, values, torch.zeros_like(numbers), numbers, positions)
    return build_cache((tier,), 16, [tokens])


def code(bits: tuple[int, ...]) -> TierFormat:
    # The same name: only the codes themselves differ.
    return TierFormat.spherical(SphericalCode.analytic("code", 64, bits, "lloyd_max:2"))


def test_layers_of_one_format_share_a_plan() -> None:
    mine, other = cache_of(code((4, 2, 2, 2))), cache_of(code((4, 2, 2, 2)))
    twin = plan_without_kernels(mine).for_twin(other)
    assert twin.cache is other and twin.handle != -1


def test_a_twin_has_its_own_positions() -> None:
    mine = cache_of(code((4, 2, 2, 2)), with_positions=True)
    assert mine.positions is not None
    later, gaps = mine.positions + 7, mine.positions * 2
    plan = plan_without_kernels(mine)
    found = plan.for_twin(replace(mine, positions=later)).work.positions
    assert found is not None and found.first.tolist() == [7, 23, 7, 23] and found.offsets is None
    found = plan.for_twin(replace(mine, positions=gaps)).work.positions
    assert found is not None and found.offsets is not None
    assert found.offsets[0].tolist() == [0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30]


def test_twins_ask_for_the_kernels_of_their_own_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, bool]] = []

    def load(variant: Variant, device: torch.device) -> object:
        asked.append((variant.offset_bytes, variant.near_offsets))
        return object()

    monkeypatch.setattr(decode, "load_kernel", load)
    mine = cache_of(code((4, 2, 2, 2)), with_positions=True)
    assert mine.positions is not None
    plan = plan_without_kernels(mine)
    for step in (1, 2, 300, 10_000):
        twin = plan.for_twin(replace(mine, positions=mine.positions * step))
        twin.kernel(logits=False, window=False, softcap=False, n_position_pairs=4)
        assert twin.kernels is plan.kernels
    assert asked == [(0, True), (2, True), (2, False), (4, False)]
    plan.kernel(logits=False, window=False, softcap=False)
    assert asked[4:] == [(0, True)]


@pytest.mark.parametrize("change", ["code", "kind", "positions", "page_size", "pool", "table"])
def test_another_format_is_refused(change: str) -> None:
    mine = cache_of(code((4, 2, 2, 2)))
    other = {
        "code": lambda: cache_of(code((3, 2, 2, 2))),
        "kind": lambda: replace(mine, tiers=(TierFormat("code", "int8"),)),
        "pool": lambda: replace(mine, pool=mine.pool[:16]),
        "table": lambda: replace(
            mine, page_table=replace(mine.page_table, offsets=mine.page_table.offsets.flip(0))
        ),
        "positions": lambda: cache_of(code((4, 2, 2, 2)), with_positions=True),
        "page_size": lambda: replace(mine, page_size=32),
    }[change]()
    with pytest.raises(PageError, match="twin"):
        plan_without_kernels(mine).for_twin(other)
