"""Arguments of a decode step that neither the kernel nor its reference takes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sphkv_kernels.cache import PagedCache
from sphkv_kernels.cache_builder import build_cache
from sphkv_kernels.cache_reader import logits_by_token
from sphkv_kernels.decode import launch_params
from sphkv_kernels.position_term import PositionTerm
from sphkv_kernels.reference import ada_decode_reference, ada_logits_reference, decode_from_logits
from sphkv_kernels.tier import PageError, TierFormat
from tests.kernels.cases import native_tiers, plan_without_kernels, random_tokens

QUERY = torch.randn((2, 4, 64), generator=torch.Generator().manual_seed(1))


def cache(*, positions: bool = True) -> PagedCache:
    tokens = [random_tokens(n, 2, 64, 3, 16, n) for n in (40, 7)]
    if not positions:
        tokens = [replace(one, positions=None) for one in tokens]
    return build_cache(native_tiers(64)[:3], 16, tokens)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_no_number_is_refused(scale: float) -> None:
    with pytest.raises(PageError, match="softmax_scale"):
        ada_decode_reference(QUERY, cache(), scale)


@pytest.mark.parametrize("softcap", [-5.0, math.nan, math.inf])
def test_a_softcap_that_caps_nothing_is_refused(softcap: float) -> None:
    with pytest.raises(PageError, match="logit_softcap"):
        ada_decode_reference(QUERY, cache(), 0.125, logit_softcap=softcap)
    with pytest.raises(PageError, match="logit_softcap"):
        decode_from_logits(
            ada_logits_reference(QUERY, cache()), cache(), 0.125, logit_softcap=softcap
        )


@pytest.mark.parametrize("window", [-1, 1 << 31])
def test_reference_and_launch_refuse_the_same_windows(window: int) -> None:
    where = torch.tensor([40, 7], dtype=torch.int32)
    with pytest.raises(PageError, match="window"):
        ada_logits_reference(QUERY, cache(), window=window, query_positions=where)
    with pytest.raises(PageError, match="window"):
        launch_params(QUERY, plan_without_kernels(cache(), 2), None, window, where)


@pytest.mark.parametrize(
    "where",
    [
        None,
        torch.tensor([40, 7, 3], dtype=torch.int32),
        torch.tensor([40], dtype=torch.int32),
        torch.tensor([40.0, 7.0]),
    ],
)
def test_a_window_needs_one_position_per_sequence(where: torch.Tensor | None) -> None:
    with pytest.raises(PageError, match="query_positions"):
        ada_logits_reference(QUERY, cache(), window=8, query_positions=where)
    with pytest.raises(PageError, match="query_positions"):
        launch_params(QUERY, plan_without_kernels(cache(), 2), None, 8, where)


def test_positions_are_needed_where_they_are_read() -> None:
    where = torch.tensor([40, 7], dtype=torch.int32)
    term = PositionTerm(torch.ones((2, 4, 2, 3)), torch.ones((2, 3)))
    without = cache(positions=False)
    tail = torch.zeros((2, 2, 16, 64), dtype=torch.bfloat16)
    with_tail = replace(
        cache(), tail_keys=tail, tail_values=tail, tail_tokens=torch.zeros(2, dtype=torch.int32)
    )
    for one in (without, with_tail):
        with pytest.raises(PageError, match="positions"):
            ada_logits_reference(QUERY, one, window=8, query_positions=where)
        with pytest.raises(PageError, match="positions"):
            ada_logits_reference(QUERY, one, position_term=term)


def test_a_cache_without_kv_heads_serves_no_query() -> None:
    none = build_cache(native_tiers(64)[:1], 16, [random_tokens(0, 0, 64, 1, 16, 1)])
    with pytest.raises(PageError, match="0 KV heads"):
        ada_logits_reference(QUERY[:1], none)


def test_negative_positions_are_refused_where_a_cache_is_checked() -> None:
    one = cache()
    assert one.positions is not None
    one.check()  # rows without a token hold -1
    bad = one.positions.clone()
    bad[0, 0] = -18
    with pytest.raises(PageError, match="one is -18"):
        replace(one, positions=bad).check()
    tail = torch.zeros((2, 2, 16, 64), dtype=torch.bfloat16)
    with_tail = replace(
        one,
        tail_keys=tail,
        tail_values=tail,
        tail_tokens=torch.zeros(2, dtype=torch.int32),
        tail_positions=torch.tensor([5, -2], dtype=torch.int32),
    )
    with pytest.raises(PageError, match="tail_positions must be 0 or more, one is -2"):
        with_tail.check()


def test_logits_in_token_order_need_room_for_every_position() -> None:
    one = cache()
    logits = ada_logits_reference(QUERY, one).pages
    assert logits_by_token(logits, one, 40).shape == (2, 2, 2, 40)
    with pytest.raises(PageError, match=r"outside 0\.\.38"):
        logits_by_token(logits, one, 39)


def test_tokens_that_cannot_be_laid_out_are_refused() -> None:
    tokens = random_tokens(20, 2, 64, 1, 16, 1)
    tiers = native_tiers(64)[:1]
    for changed, message in (
        (replace(tokens, keys=tokens.keys[:, 0]), "expected .n_tokens, n_kv_heads, head_dim"),
        (replace(tokens, tier_of_token=tokens.tier_of_token.float()), "tier_of_token .* integers"),
        (replace(tokens, page_of_token=tokens.page_of_token.float()), "page_of_token .* integers"),
    ):
        with pytest.raises(PageError, match=message):
            build_cache(tiers, 16, [changed])
    with pytest.raises(PageError, match="up to 128"):
        build_cache((TierFormat.int8(),) * 129, 16, [tokens])
