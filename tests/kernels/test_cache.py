"""Laws of the paged cache: a well-formed table, every kept token on exactly one row."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_kernels.cache import PagedCache
from sphkv_kernels.cache_builder import build_cache
from sphkv_kernels.layout import Operand
from sphkv_kernels.page_slots import SequenceTokens
from sphkv_kernels.pages import unpack_region
from sphkv_kernels.plan import make_plan
from sphkv_kernels.tier import PageError, RegionFormat
from sphkv_kernels.vectors import decode_vectors, encode_vectors
from tests.kernels.cases import native_tiers, pages_of, plan_without_kernels, random_tokens

TIERS = native_tiers(64)


def small_cache(lengths: tuple[int, ...], page_size: int = 16, seed: int = 0) -> PagedCache:
    sequences = [
        random_tokens(n, 2, 64, len(TIERS), page_size, seed + i) for i, n in enumerate(lengths)
    ]
    return build_cache(TIERS, page_size, sequences)


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=3),
    page_size=st.sampled_from((16, 32, 64)),
    seed=st.integers(0, 2**31),
)
def test_the_table_holds_every_kept_token_once(
    lengths: list[int], page_size: int, seed: int
) -> None:
    sequences = [
        random_tokens(n, 2, 64, len(TIERS), page_size, seed + i) for i, n in enumerate(lengths)
    ]
    cache = build_cache(TIERS, page_size, sequences)
    cache.check()
    table = cache.page_table
    assert cache.pool.numel() == sum(cache.tier_page_bytes()[t] for t in table.tiers.tolist())
    # Pages fill the pool in the order of the entries, without holes and without overlap.
    sizes = torch.tensor(cache.tier_page_bytes())[table.tiers.to(torch.int64)]
    assert torch.equal(table.offsets, sizes.cumsum(0) - sizes)
    assert cache.positions is not None
    for s, tokens in enumerate(sequences):
        for h in range(2):
            first, last = table.starts[2 * s + h : 2 * s + h + 2].tolist()
            found: dict[int, int] = {}
            for entry in range(first, last):
                live = int(table.live_tokens[entry])
                assert 0 < live <= page_size
                assert bool((cache.positions[entry, live:] == -1).all())
                for position in cache.positions[entry, :live].tolist():
                    assert position not in found
                    found[position] = int(table.tiers[entry])
            kept = tokens.tier_of_token[:, h]
            expected = {t: int(kept[t]) for t in range(kept.shape[0]) if int(kept[t]) >= 0}
            order = table.tiers[first:last].tolist()
            assert order == sorted(order)
            assert found == expected


@pytest.mark.parametrize("n_tokens", [70, 900])
def test_rows_hold_the_codes_of_their_own_token(n_tokens: int) -> None:
    """On full pages, which are encoded at once, as on those with dead rows."""
    tokens = random_tokens(n_tokens, 2, 64, len(TIERS), 16, seed=5)
    cache = build_cache(TIERS, 16, [tokens])
    full = cache.page_table.live_tokens == 16
    if n_tokens == 900:
        assert not bool(full.all())
        for tier in range(len(TIERS)):
            assert bool(full[cache.page_table.tiers == tier].any())
    assert cache.positions is not None
    heads = cache.page_table.head_of_entry()
    for entry, (offset, index, live) in enumerate(
        zip(
            cache.page_table.offsets.tolist(),
            cache.page_table.tiers.tolist(),
            cache.page_table.live_tokens.tolist(),
            strict=True,
        )
    ):
        tier = TIERS[index]
        page = cache.pool[offset : offset + cache.tier_page_bytes()[index]]
        key_bytes = page.numel() - _value_bytes(cache, index)
        positions = cache.positions[entry, :live].to(torch.int64)
        head = int(heads[entry])
        regions: tuple[tuple[RegionFormat, Operand, torch.Tensor, torch.Tensor], ...] = (
            (tier.key_format, "key", page[:key_bytes], tokens.keys),
            (tier.value_format, "value", page[key_bytes:], tokens.values),
        )
        for region_format, operand, region, x in regions:
            stored = unpack_region(region_format, operand, region[None], 64, 16)
            decoded = decode_vectors(region_format, stored)[0, :live]
            alone = encode_vectors(region_format, x[positions, head])
            assert torch.equal(decoded, decode_vectors(region_format, alone))


def _value_bytes(cache: PagedCache, index: int) -> int:
    from sphkv_kernels.pages import region_bytes

    return region_bytes(TIERS[index].value_format, cache.head_dim, cache.page_size)


def test_selecting_sequences_shares_pages() -> None:
    cache = small_cache((33, 0, 50))
    chosen = cache.select_sequences([2, 0, 2, 1])
    chosen.check()
    assert chosen.pool is cache.pool
    heads = cache.page_table.head_of_entry() // 2
    new_heads = chosen.page_table.head_of_entry() // 2
    for new, old in enumerate([2, 0, 2, 1]):
        mine = chosen.page_table.offsets[new_heads == new]
        assert torch.equal(mine, cache.page_table.offsets[heads == old])
    with pytest.raises(PageError, match="sequence 3"):
        cache.select_sequences([3])


def test_dead_slots_may_hold_anything_and_live_ones_may_not() -> None:
    cache = small_cache((40,))
    table = cache.page_table
    live = table.live_tokens.clone()
    offsets = table.offsets.clone()
    offsets[0] = 1 << 60
    broken = replace(cache, page_table=replace(table, offsets=offsets))
    with pytest.raises(PageError, match="entry 0: page at byte"):
        broken.check()
    live[0] = 0
    replace(cache, page_table=replace(table, offsets=offsets, live_tokens=live)).check()
    live[0] = 17
    with pytest.raises(PageError, match="17 live tokens on a page of 16"):
        replace(cache, page_table=replace(table, live_tokens=live)).check()
    tiers = table.tiers.clone()
    tiers[0] = 99
    with pytest.raises(PageError, match="entry 0: tier 99"):
        replace(cache, page_table=replace(table, tiers=tiers)).check()


def _tokens(tier: torch.Tensor, page: torch.Tensor) -> SequenceTokens:
    x = torch.zeros((*tier.shape, 64))
    return SequenceTokens(x, x, tier, page)


def test_pages_that_cannot_be_are_refused() -> None:
    zeros = torch.zeros((17, 1), dtype=torch.int64)
    with pytest.raises(PageError, match="has 17 tokens; a page holds 16"):
        build_cache(TIERS, 16, [_tokens(zeros, zeros)])
    mixed = zeros.clone()[:4]
    mixed[2] = 1
    with pytest.raises(PageError, match="two tiers"):
        build_cache(TIERS, 16, [_tokens(mixed, zeros[:4])])
    with pytest.raises(PageError, match=r"outside 0\.\."):
        build_cache(TIERS, 16, [_tokens(zeros[:4] + 99, zeros[:4])])
    with pytest.raises(PageError, match="page -1"):
        build_cache(TIERS, 16, [_tokens(zeros[:4], zeros[:4] - 1)])
    with pytest.raises(PageError, match=r"values is \(4, 1, 32\)"):
        build_cache(
            TIERS,
            16,
            [replace(_tokens(zeros[:4], zeros[:4]), values=torch.zeros((4, 1, 32)))],
        )
    with pytest.raises(PageError, match="at least one sequence"):
        build_cache(TIERS, 16, [])


def test_nan_in_a_kept_token_is_refused_and_in_a_dropped_one_ignored() -> None:
    tokens = random_tokens(20, 1, 64, len(TIERS), 16, seed=1)
    for index in range(len(TIERS)):
        tier = torch.full((20, 1), index)
        tier[7] = -1
        tokens = replace(tokens, tier_of_token=tier, page_of_token=pages_of(tier, 16))
        keys = tokens.keys.clone()
        keys[7] = torch.nan
        build_cache(TIERS, 16, [replace(tokens, keys=keys)])
        keys[8, 0, 3] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            build_cache(TIERS, 16, [replace(tokens, keys=keys)])


def test_wrong_shapes_and_devices_of_a_cache_are_named() -> None:
    cache = small_cache((20,))
    with pytest.raises(PageError, match=r"cache\.pool is"):
        replace(cache, pool=cache.pool.to(torch.int32))
    with pytest.raises(PageError, match=r"page_table\.starts"):
        replace(cache, n_sequences=2)
    with pytest.raises(PageError, match="come together"):
        replace(cache, tail_tokens=torch.zeros(1, dtype=torch.int32))
    tail = torch.zeros((1, 8, cache.n_kv_heads, cache.head_dim), dtype=torch.bfloat16)
    one = torch.ones(1, dtype=torch.int32)
    for keys, what in ((tail.transpose(1, 2), "not contiguous"), (tail[0, 0], r"tail_keys is")):
        with pytest.raises(PageError, match=what):
            replace(cache, tail_keys=keys, tail_values=keys, tail_tokens=one)


def test_strided_and_unaligned_tensors_are_refused() -> None:
    cache = small_cache((20,))
    twice = torch.zeros(2 * cache.pool.numel() + 16, dtype=torch.uint8)
    with pytest.raises(PageError, match=r"cache\.pool is not contiguous"):
        replace(cache, pool=twice[::2])
    unaligned = replace(cache, pool=twice[8 : 8 + cache.pool.numel()])
    for use in (partial(make_plan, n_blocks=2), plan_without_kernels(cache).for_twin):
        with pytest.raises(PageError, match=r"cache\.pool does not start at a multiple of 16"):
            use(unaligned)
    rows = torch.arange(cache.page_size, dtype=torch.int32)
    with pytest.raises(PageError, match=r"cache\.positions is not contiguous"):
        replace(cache, positions=rows.expand(cache.page_table.n_entries, -1))
