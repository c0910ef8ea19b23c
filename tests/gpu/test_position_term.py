"""Centring before RoPE on the GPU: the term of every token's position, whatever its tier."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.decode import ada_decode, ada_logits, plan
from sphkv_kernels.position_term import PositionTerm
from sphkv_kernels.reference import ada_decode_reference, ada_logits_reference
from sphkv_kernels.tier import PageError, TierFormat
from tests.gpu.cases import errors, needs_cuda, ragged_cache, random_query, tier_set, with_tail

pytestmark = [pytest.mark.gpu, needs_cuda]


def random_term(cache: PagedCache, group_size: int, n_pairs: int, scale: float) -> PositionTerm:
    """Coefficients of `scale` and RoPE-like frequencies 1, ..., 10^-4 in another order per head."""
    generator = torch.Generator().manual_seed(n_pairs)
    shape = (cache.n_sequences, cache.n_kv_heads * group_size, 2, n_pairs)
    exponents = torch.rand((cache.n_kv_heads, n_pairs), generator=generator)
    coefficients = scale * torch.randn(shape, generator=generator)
    return PositionTerm(coefficients, 10.0 ** (-4 * exponents))


def moved(cache: PagedCache, first: int) -> PagedCache:
    """The same cache `first` positions later, stored as int32."""
    assert cache.positions is not None
    return replace(cache, positions=cache.positions.to(torch.int32) + first)


def in_runs(cache: PagedCache) -> PagedCache:
    """The same cache with positions that follow one another on every page."""
    assert cache.positions is not None
    rows = torch.arange(cache.page_size, dtype=torch.int32)
    first = cache.positions[:, :1].to(torch.int32)
    return replace(cache, positions=(first + rows).to(cache.positions.dtype))


def check(
    cache: PagedCache,
    group_size: int,
    term: PositionTerm,
    *,
    runs: bool | None = None,
    **options: object,
) -> None:
    """runs: which of the two kernels must serve the cache, where that is the point."""
    query = random_query(cache, group_size, seed=3)
    scale = cache.head_dim**-0.5
    on_gpu = cache.to("cuda")
    steps = plan(on_gpu, group_size)
    assert steps.work.positions is not None
    assert runs is None or runs == (steps.work.positions.offsets is None)
    there = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    want = ada_decode_reference(query, cache, scale, position_term=term, **options)  # type: ignore[arg-type]
    got = ada_decode(
        query.cuda(), on_gpu, scale, position_term=term.to("cuda"), plan=steps,
        **there,  # type: ignore[arg-type]
    )  # fmt: skip
    output_error, lse_error = errors(got, want)
    assert output_error <= 2e-3
    logits = ada_logits_reference(query, cache, position_term=term)
    live = torch.isfinite(logits.pages)
    assert lse_error <= 1e-3 * max(1.0, float(logits.pages[live].abs().max()) / 10)
    result = ada_logits(query.cuda(), on_gpu, position_term=term.to("cuda"), plan=steps)
    error = (result.pages.cpu().double() - logits.pages)[live]
    assert error.square().mean().sqrt() <= 1e-3 * logits.pages[live].square().mean().sqrt()
    assert torch.equal(torch.isneginf(result.pages.cpu()), torch.isneginf(logits.pages))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("n_pairs", [1, 4, 5, 13])
def test_term_equals_reference(head_dim: int, n_pairs: int) -> None:
    cache = ragged_cache(tier_set(head_dim, 2, 3, 7), seed=n_pairs)
    assert cache.positions is not None
    term = random_term(cache, 4, n_pairs, 10.0)
    check(cache, 4, term)
    check(replace(cache, positions=cache.positions.to(torch.uint16)), 4, term)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("n_pairs", "group_size", "page_size"), [(1, 1, 16), (13, 4, 16), (13, 12, 32), (8, 4, 64)]
)
@pytest.mark.parametrize("gap", [False, True])
def test_runs_of_tokens_and_gaps_both_equal_the_reference(
    head_dim: int, n_pairs: int, group_size: int, page_size: int, gap: bool
) -> None:
    cache = ragged_cache(tier_set(head_dim, 3), page_size=page_size, lengths=(1, 31, 64, 100, 517))
    assert cache.positions is not None
    steps = cache.positions[:, 1:].to(torch.int32) - cache.positions[:, :-1].to(torch.int32)
    full = cache.page_table.live_tokens == page_size
    assert bool((steps[full] == 1).all())  # one tier, nothing dropped: runs
    if gap:
        positions = cache.positions.to(torch.int32)
        cache = replace(cache, positions=positions + positions // 11)
    check(cache, group_size, random_term(cache, group_size, n_pairs, 10.0), runs=not gap)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("group_size", [1, 12])
@pytest.mark.parametrize("runs", [False, True])
def test_every_kind_of_tier_has_the_term(page_size: int, group_size: int, runs: bool) -> None:
    tiers = tier_set(128, 0, 1, 5, 8)
    cache = ragged_cache(tiers, page_size=page_size, drop_fraction=0.2)
    if runs:
        cache = in_runs(cache)
    cache = with_tail(cache, (0, 1, 15, 16, 17, 40, 33), capacity=41, seed=5)
    check(cache, group_size, random_term(cache, group_size, 6, 10.0), runs=runs)


@pytest.mark.parametrize("page_size", [16, 32])
@pytest.mark.parametrize(("step", "near", "offset_bytes"), [(1, 1, 2), (97, 0, 2), (3001, 0, 4)])
def test_tokens_of_a_page_lie_in_any_order_and_far_apart(
    step: int, near: bool, offset_bytes: int, page_size: int
) -> None:
    cache = ragged_cache(tier_set(128, 1, 3, 0), page_size=page_size)
    assert cache.positions is not None
    positions = (600 - cache.positions.to(torch.int32)) * step + 1
    cache = with_tail(replace(cache, positions=positions), (0, 3, 15, 16, 17, 40, 33), 41, seed=5)
    found = plan(cache.to("cuda"), 4).work.positions
    assert found is not None and found.near == near and found.offset_bytes == offset_bytes
    check(cache, 4, random_term(cache, 4, 9, 10.0), runs=False)


@pytest.mark.parametrize("span", [4000, 65000])
def test_tokens_far_apart_on_a_page_are_as_exact_as_near_ones(span: int) -> None:
    """A query of nothing: its logits are the term."""
    cache = ragged_cache(tier_set(128, 3), lengths=(64,))
    spread = torch.linspace(3, span, cache.page_size).to(torch.uint16)
    cache = replace(cache, positions=spread.repeat(cache.page_table.n_entries, 1))
    on_gpu = cache.to("cuda")
    steps = plan(on_gpu, 4)
    assert steps.work.positions is not None and steps.work.positions.near == (span == 4000)
    query, term = torch.zeros_like(random_query(cache, 4, seed=3)), random_term(cache, 4, 8, 1.0)
    want = ada_logits_reference(query, cache, position_term=term).pages
    got = ada_logits(query.cuda(), on_gpu, position_term=term.to("cuda"), plan=steps).pages.cpu()
    live = torch.isfinite(want)
    largest = float(term.coefficients.abs().sum(dim=(2, 3)).max())
    assert (got.double() - want)[live].abs().max() <= 5e-6 * largest


def test_runs_without_room_for_their_features_equal_the_reference() -> None:
    cache = ragged_cache(
        (TierFormat.spherical(SphericalCode.analytic("code", 128, (4, 2, 2, 2), "lloyd_max:2")),)
    )
    steps = plan(cache.to("cuda"), 4)
    kernel = steps.kernel(logits=False, window=False, softcap=False, n_position_pairs=61)
    assert "#define POSITION_RUNS 0" in kernel.source.text
    check(cache, 4, random_term(cache, 4, 61, 3.0), runs=True)


@pytest.mark.parametrize("gap", [False, True])
def test_far_positions_are_as_exact_as_near_ones(gap: bool) -> None:
    cache = moved(ragged_cache(tier_set(128, 3)), 1_000_000)
    if gap:
        assert cache.positions is not None
        cache = replace(cache, positions=cache.positions + cache.positions % 7)
    term = random_term(cache, 4, 4, 1.0)
    # A coefficient of 1000 on pair 0 and a key of almost nothing: an error of phase would show.
    coefficients = term.coefficients * 0
    coefficients[..., 0] = 100.0
    frequencies = term.frequencies.clone()
    frequencies[:, 0] = 0.999
    check(cache, 4, PositionTerm(coefficients, frequencies))


@pytest.mark.parametrize("runs", [False, True])
def test_term_works_with_softcap_window_and_offset(runs: bool) -> None:
    cache = ragged_cache(tier_set(128, 2, 3, 0), lengths=(40, 300, 301))
    if runs:
        cache = in_runs(cache)
    cache = with_tail(cache, (3, 20, 0), capacity=32, seed=7)
    term = random_term(cache, 4, 4, 3.0)
    now = torch.tensor([320, 310, 305], dtype=torch.int32)
    offset = torch.linspace(-5, 5, 3 * 8).view(3, 8)
    check(cache, 4, term, runs=runs, logit_softcap=20.0, logit_offset=offset)
    check(cache, 4, term, runs=runs, window=100, query_positions=now)
    check(moved(cache, 70000), 4, term, runs=runs)


@pytest.mark.parametrize("runs", [False, True])
def test_many_rows_of_one_block_have_their_own_terms(runs: bool) -> None:
    cache = ragged_cache(tier_set(128, 3, 1), lengths=(70, 5, 300))
    if runs:
        cache = in_runs(cache)
    query, term = random_query(cache, 4, seed=1), random_term(cache, 4, 4, 5.0)
    want = ada_decode_reference(query, cache, 0.09, position_term=term)
    on_gpu = cache.to("cuda")
    for n_blocks in (1, 2, 40):
        steps = plan(on_gpu, 4, n_blocks=n_blocks)
        got = ada_decode(query.cuda(), on_gpu, 0.09, position_term=term.to("cuda"), plan=steps)
        assert errors(got, want)[0] <= 2e-3
        logits = ada_logits(query.cuda(), on_gpu, position_term=term.to("cuda"), plan=steps)
        expected = ada_logits_reference(query, cache, position_term=term).pages
        live = torch.isfinite(expected)
        assert (logits.pages.cpu()[live] - expected[live]).abs().max() <= 0.05


def test_term_without_positions_is_refused() -> None:
    cache = ragged_cache(tier_set(128, 3)).to("cuda")
    query, term = random_query(cache, 4, seed=1).cuda(), random_term(cache, 4, 2, 1.0)
    with pytest.raises(PageError, match="built with positions"):
        ada_decode(query, replace(cache, positions=None), 0.1, position_term=term.to("cuda"))
    with pytest.raises(PageError, match="coefficients is"):
        ada_decode(query, cache, 0.1, position_term=term)
