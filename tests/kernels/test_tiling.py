"""Laws of tiling: every copy at its own address, the same attention, ln r more log-sum-exp."""

import math
from dataclasses import replace

import pytest
import torch

from sphkv_kernels.cache_builder import build_cache
from sphkv_kernels.cache_reader import logits_by_token, read_tokens
from sphkv_kernels.reference import ada_decode_reference, ada_logits_reference
from sphkv_kernels.tier import PageError
from sphkv_kernels.tiling import tile_pages
from sphkv_kernels.vectors import decode_vectors, encode_vectors
from tests.kernels.cases import native_tiers, random_tokens

TIERS = native_tiers(64)


def test_tiling_repeats_attention_at_addresses_of_its_own() -> None:
    cache = build_cache(TIERS, 16, [random_tokens(70, 2, 64, len(TIERS), 16, seed=1)])
    tiled = tile_pages(cache, 3, 5)
    tiled.check()
    assert tiled.page_table.offsets.unique().numel() == 15 * cache.page_table.n_entries
    assert tiled.pool.numel() == 15 * cache.pool.numel()
    query = torch.randn((1, 4, 64), generator=torch.Generator().manual_seed(2))
    one = ada_decode_reference(query, cache, 0.125)
    many = ada_decode_reference(query.expand(3, 4, 64), tiled, 0.125)
    # 1e-13: the same terms, five times over.
    torch.testing.assert_close(many.output, one.output.expand(3, 4, 64), rtol=0, atol=1e-13)
    expected = (one.log_sum_exp + math.log(5)).expand(3, 4)
    torch.testing.assert_close(many.log_sum_exp, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint16])
def test_positions_move_with_every_repeat(dtype: torch.dtype) -> None:
    tokens = replace(random_tokens(70, 2, 64, len(TIERS), 16, seed=1), positions=torch.arange(70))
    cache = build_cache(TIERS, 16, [tokens], position_dtype=dtype)
    tiled = tile_pages(cache, 2, 3, span=70)
    assert tiled.positions is not None and cache.positions is not None
    live = torch.arange(16) < tiled.page_table.live_tokens[:, None]
    positions = tiled.positions.to(torch.int64)
    kept = (tokens.tier_of_token >= 0)[:, 0].nonzero().flatten()
    first_head = tiled.page_table.head_of_entry() == 0
    expected = torch.cat([kept + 70 * repeat for repeat in range(3)])
    found = positions[first_head][live[first_head]]
    assert found.sort().values.tolist() == expected.tolist()
    dead = {torch.int32: -1, torch.uint16: 0xFFFF}[dtype]
    assert bool((positions[~live] == dead).all())
    with pytest.raises(PageError, match="built with positions"):
        tile_pages(replace(cache, positions=None), 1, 2, span=70)
    if dtype == torch.uint16:
        with pytest.raises(PageError, match=r"which torch\.uint16 does not hold"):
            tile_pages(cache, 1, 3, span=40_000)


def test_tiling_refuses_what_it_cannot_repeat() -> None:
    sequences = [random_tokens(20, 1, 64, 1, 16, seed=i) for i in range(2)]
    with pytest.raises(PageError, match="one sequence"):
        tile_pages(build_cache(TIERS, 16, sequences), 1, 1)
    with pytest.raises(PageError, match="0 repeats"):
        tile_pages(build_cache(TIERS, 16, sequences[:1]), 1, 0)


def test_tokens_and_logits_come_back_in_token_order() -> None:
    sequences = [random_tokens(n, 2, 64, len(TIERS), 16, seed=n) for n in (40, 33)]
    cache = build_cache(TIERS, 16, sequences)
    query = torch.randn((2, 4, 64), generator=torch.Generator().manual_seed(2)).double()
    logits = logits_by_token(ada_logits_reference(query, cache).pages, cache, 40)
    for s, tokens in enumerate(sequences):
        n_tokens = tokens.keys.shape[0]
        read = read_tokens(cache, s, n_tokens)
        assert torch.equal(read.kept, tokens.tier_of_token >= 0)
        for index, tier in enumerate(TIERS):
            rows = torch.nonzero(tokens.tier_of_token == index, as_tuple=True)
            stored = encode_vectors(tier.key_format, tokens.keys[rows])
            assert torch.equal(read.keys[rows], decode_vectors(tier.key_format, stored))
            stored = encode_vectors(tier.value_format, tokens.values[rows])
            assert torch.equal(read.values[rows], decode_vectors(tier.value_format, stored))
        expected = torch.einsum("hgd,thd->hgt", query[s].reshape(2, 2, 64), read.keys)
        expected = expected.masked_fill(~read.kept.T[:, None], torch.nan)
        found = logits[s, :, :, :n_tokens]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, equal_nan=True)
        assert bool(logits[s, :, :, n_tokens:].isnan().all())
    with pytest.raises(PageError, match=r"outside 0\.\.29"):
        read_tokens(cache, 0, 30)
