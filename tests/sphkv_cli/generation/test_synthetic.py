"""A cache filled at random is, to the next token, one that read a prompt of that length."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sphkv_cli.errors import UsageError
from sphkv_cli.generation.placement import UniformRule
from sphkv_cli.generation.spherical_cache import SphericalCache
from sphkv_cli.generation.synthetic import fill_at_random
from sphkv_codebooks.frame import FrameSet
from sphkv_kernels.tier import TierFormat


@pytest.mark.parametrize("n_tokens", [5, 100])
def test_it_is_as_large_as_a_real_one_and_goes_on(
    random_model: Callable[[str], Any], frames: Callable[[str], FrameSet], n_tokens: int
) -> None:
    model = random_model("llama")
    rule = UniformRule.of(TierFormat.int8(), frames("none"), page_size=16, window=8, first_tokens=0)
    cache, real = SphericalCache(model, rule), SphericalCache(model, rule)
    fill_at_random(cache, 2, n_tokens, torch.float64)
    ids = torch.randint(1, 128, (2, n_tokens + 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        model(ids[:, :n_tokens], past_key_values=real)
        assert cache.memory_bytes() == real.memory_bytes()
        for step in range(n_tokens, n_tokens + 20):
            logits = model(ids[:, step : step + 1], past_key_values=cache).logits
            model(ids[:, step : step + 1], past_key_values=real)
            assert torch.isfinite(logits).all()
    assert cache.memory_bytes() == real.memory_bytes()
    for one, other in zip(cache.states(), real.states(), strict=True):
        assert one is not None and other is not None
        assert one.n_sealed == other.n_sealed and one.next_position == other.next_position


def test_large_caches_seal_more_rarely_and_never_lose_a_token(
    frames: Callable[[str], FrameSet],
) -> None:
    rule = UniformRule.of(TierFormat.int8(), frames("none"), page_size=16, window=8, first_tokens=0)
    assert rule.tokens_per_seal(0) == rule.tokens_per_seal(128 * 16) == 16
    assert rule.tokens_per_seal(100_000) == 48 * 16
    n_sealed, n_tail, seals = 100_000 // 16 * 16, 8, 0
    for _ in range(2000):
        n_tail += 1
        placed = rule.place_later(n_sealed, n_tail, 2)
        if placed is not None:
            seals += 1
            n_sealed, n_tail = n_sealed + placed.n_placed, n_tail - placed.n_placed
    assert n_sealed + n_tail == 100_000 // 16 * 16 + 8 + 2000 and seals == 2


def test_caches_that_need_positions_are_refused(
    random_model: Callable[[str], Any], frames: Callable[[str], FrameSet]
) -> None:
    model = random_model("llama")
    for rule in (
        UniformRule.of(TierFormat.int8(), frames("none"), first_tokens=4),
        UniformRule.of(TierFormat.int8(), frames("pre_rope"), first_tokens=0),
    ):
        with pytest.raises(UsageError, match="filled at random"):
            fill_at_random(SphericalCache(model, rule), 1, 100, torch.float64)
