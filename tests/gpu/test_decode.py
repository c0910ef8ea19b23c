"""The kernel computes what the float64 reference computes from the same codes."""

from __future__ import annotations

from dataclasses import replace
from threading import Thread

import pytest
import torch

from sphkv_kernels import launch, variant
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.decode import ada_decode, ada_logits, plan
from sphkv_kernels.launch import KernelLaunchError
from sphkv_kernels.reference import (
    DecodeResult,
    LogitResult,
    ada_logits_reference,
    decode_from_logits,
    merge_partial,
)
from sphkv_kernels.tier import PageError
from sphkv_kernels.variant import LISTED_SEGMENTS
from tests.gpu.cases import (
    check_decode,
    errors,
    needs_cuda,
    ragged_cache,
    random_query,
    tier_set,
    with_tail,
)

pytestmark = [pytest.mark.gpu, needs_cuda]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("tier", range(10))
def test_each_tier_equals_reference(head_dim: int, tier: int) -> None:
    tiers = tier_set(head_dim, tier) if tier > 1 else tier_set(head_dim, tier, 2)
    cache = ragged_cache(tiers, seed=tier)
    check_decode(cache, random_query(cache, 4, seed=tier))


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("group_size", [1, 3, 8, 16])
def test_mixed_tiers_equal_reference(page_size: int, group_size: int) -> None:
    cache = ragged_cache(tier_set(128, 0, 1, 2, 3, 7), page_size=page_size, drop_fraction=0.2)
    check_decode(cache, random_query(cache, group_size, seed=1))


def test_all_tiers_in_one_launch() -> None:
    cache = ragged_cache(tier_set(64), page_size=16)
    check_decode(cache, random_query(cache, 3, seed=2))


def test_a_block_of_more_segments_than_it_lists_reads_them_all() -> None:
    cache = ragged_cache(tier_set(64), page_size=16, lengths=(200, 1, 150, 90, 64, 130))
    query = random_query(cache, 3, seed=2)
    on_gpu = cache.to("cuda")
    alone = plan(on_gpu, 3, n_blocks=1)
    assert alone.work.segments.shape[0] > max(LISTED_SEGMENTS)
    check_decode(cache, query, attention_plan=alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_query_types_agree(dtype: torch.dtype) -> None:
    cache = ragged_cache(tier_set(128, 3))
    query = random_query(cache, 4, seed=3)
    on_gpu = cache.to("cuda")
    wide = ada_decode(query.cuda(), on_gpu, 0.09)
    narrow = ada_decode(query.to(dtype).cuda(), on_gpu, 0.09)
    assert torch.equal(wide.output, narrow.output)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group_size", [1, 3, 8, 13])
def test_any_cut_gives_the_same_attention(head_dim: int, group_size: int) -> None:
    cache = ragged_cache(tier_set(head_dim, 2, 3), lengths=(3000, 5, 700))
    query, on_gpu = random_query(cache, group_size, seed=4), cache.to("cuda")
    for n_blocks in (1, 7, 132, 500):
        cut = plan(on_gpu, group_size, n_blocks=n_blocks)
        check_decode(cache, query, attention_plan=cut)
    # Merged in several rounds, and by shares of a block's threads where there are enough.
    assert cut.work.heads[:, 6].max() > 16


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize(
    ("head_dim", "tiers"), [(128, (0,)), (128, (1,)), (64, (0, 1, 3)), (256, (0, 1, 3))]
)
def test_rows_and_a_tail_of_many_units(
    head_dim: int, tiers: tuple[int, ...], page_size: int
) -> None:
    cache = ragged_cache(
        tier_set(head_dim, *tiers), page_size=page_size, lengths=(3000, 700), drop_fraction=0.2
    )
    table = cache.page_table
    live = table.live_tokens.clone()
    live[20:23] = torch.tensor([0, 5, 1], dtype=live.dtype)  # not the last pages of their tier
    cache = replace(cache, page_table=replace(table, live_tokens=live))
    cache = with_tail(cache, (299, 210), capacity=300, seed=36)
    query, on_gpu = random_query(cache, 4, seed=36), cache.to("cuda")
    for n_blocks in (1, 5):
        check_decode(cache, query, attention_plan=plan(on_gpu, 4, n_blocks=n_blocks))


def test_tail_of_any_length() -> None:
    cache = ragged_cache(tier_set(128, 3, 1))
    cache = with_tail(cache, (0, 1, 15, 16, 17, 40, 33), capacity=41, seed=5)
    check_decode(cache, random_query(cache, 4, seed=5))


def test_no_live_token_gives_zero_and_minus_infinity() -> None:
    cache = ragged_cache(tier_set(128, 3), lengths=(0, 40))
    result = check_decode(cache, random_query(cache, 4, seed=6))
    assert torch.isneginf(result.log_sum_exp[0]).all()
    assert (result.output[0] == 0).all()


def test_offset_softcap_and_window_equal_reference() -> None:
    cache = ragged_cache(tier_set(128, 2, 3, 0, 1), lengths=(40, 300, 301))
    cache = with_tail(cache, (3, 20, 0), capacity=32, seed=7)
    query = random_query(cache, 4, seed=7, scale=3.0)
    offset = torch.linspace(-5, 5, query.shape[0] * query.shape[1]).view(query.shape[:2])
    now = torch.tensor([320, 310, 305], dtype=torch.int32)
    check_decode(cache, query, logit_offset=offset)
    check_decode(cache, query, logit_offset=offset, logit_softcap=5.0)
    for window in (1, 7, 100, 1000):
        check_decode(cache, query, window=window, query_positions=now)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group_size", [3, 12])
def test_logits_equal_reference(head_dim: int, group_size: int) -> None:
    cache = ragged_cache(tier_set(head_dim, 0, 1, 2, 3, 7), page_size=64)
    cache = with_tail(cache, (0, 1, 15, 16, 17, 40, 33), capacity=41, seed=8)
    query = random_query(cache, group_size, seed=8)
    offset = torch.randn(query.shape[:2], generator=torch.Generator().manual_seed(8))
    expected = ada_logits_reference(query, cache, logit_offset=offset)
    result = ada_logits(query.cuda(), cache.to("cuda"), logit_offset=offset.cuda())
    assert result.tail is not None
    assert expected.tail is not None
    for got, want in ((result.pages, expected.pages), (result.tail, expected.tail)):
        got = got.cpu().to(torch.float64)
        assert torch.equal(torch.isneginf(got), torch.isneginf(want))
        live = torch.isfinite(want)
        error = (got[live] - want[live]).square().mean().sqrt() / want[live].square().mean().sqrt()
        assert error <= 1e-3


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("tier", [2, 3, 5, 7, 9])
def test_query_tables_equal_reference(head_dim: int, group_size: int, tier: int) -> None:
    cache = ragged_cache(tier_set(head_dim, tier), seed=tier)
    by_table = plan(cache.to("cuda"), group_size, score_form="table")
    query = random_query(cache, group_size, seed=tier)
    result = check_decode(cache, query, attention_plan=by_table)
    by_fragment = plan(by_table.cache, group_size, score_form="fragment")
    other = check_decode(cache, query, attention_plan=by_fragment)
    assert not torch.equal(result.output, other.output)  # two forms, not one under two names


@pytest.mark.parametrize("group_size", [1, 2])
def test_query_tables_that_leave_room_for_the_sums_of_one_warp(group_size: int) -> None:
    cache = ragged_cache(tier_set(128, 2, 4), lengths=(3000, 65), seed=37)
    query = random_query(cache, group_size, seed=38)
    by_table = plan(cache.to("cuda"), group_size, n_blocks=40, score_form="table")
    check_decode(cache, query, attention_plan=by_table)


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("group_size", [1, 2])
def test_query_tables_beside_other_tiers(page_size: int, group_size: int) -> None:
    # int8, dense and 4/3/3/3 r3 have no query table; 3/2/2/2 has another one than 4/2/2/2.
    tiers = tier_set(64, 2, 0, 1, 7)
    cache = ragged_cache(tiers, page_size=page_size, drop_fraction=0.2, seed=31)
    cache = with_tail(cache, (0, 1, 15, 16, 17, 40, 33), capacity=41, seed=32)
    query = random_query(cache, group_size, seed=33)
    for n_blocks in (1, 500):
        by_table = plan(cache.to("cuda"), group_size, n_blocks=n_blocks, score_form="table")
        check_decode(cache, query, attention_plan=by_table)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 50.0])
@pytest.mark.parametrize("tier", [2, 7])
def test_query_tables_follow_the_scale_of_the_query(scale: float, tier: int) -> None:
    cache = ragged_cache(tier_set(128, tier), lengths=(300, 17), seed=34)
    query = random_query(cache, 2, seed=34, scale=scale)
    query[:, ::2] *= 100.0  # heads of one table differ in scale
    by_table = plan(cache.to("cuda"), 2, score_form="table")
    check_decode(cache, query, softmax_scale=1e-3 / scale, attention_plan=by_table)


@pytest.mark.parametrize("group_size", [1, 2])
def test_query_tables_write_the_logits_they_attend_with(group_size: int) -> None:
    cache = ragged_cache(tier_set(128, 3), page_size=64)
    query = random_query(cache, group_size, seed=35)
    by_table = plan(cache.to("cuda"), group_size, score_form="table")
    expected = ada_logits_reference(query, cache).pages
    got = ada_logits(query.cuda(), by_table.cache, plan=by_table).pages.cpu().to(torch.float64)
    assert torch.equal(torch.isneginf(got), torch.isneginf(expected))
    live = torch.isfinite(expected)
    error = (got[live] - expected[live]).square().mean() / expected[live].square().mean()
    assert error.sqrt() <= 1e-3


def test_query_tables_are_refused_where_there_are_none() -> None:
    cache = ragged_cache(tier_set(128, 3)).to("cuda")
    with pytest.raises(PageError, match="groups of 1 and 2"):
        plan(cache, 3, score_form="table")
    with pytest.raises(PageError, match="no key code"):
        plan(ragged_cache(tier_set(256, 3)).to("cuda"), 1, score_form="table")
    with pytest.raises(PageError, match="no key code"):
        plan(ragged_cache(tier_set(128, 6)).to("cuda"), 1, score_form="table")
    with pytest.raises(PageError, match="auto, fragment or table"):
        plan(cache, 1, score_form="both")  # type: ignore[arg-type]


def test_mixed_cache_is_the_merge_of_its_tiers() -> None:
    mixed = ragged_cache(tier_set(128, 2, 3, 7), lengths=(900, 65)).to("cuda")
    query = random_query(mixed, 4, seed=9).cuda()
    parts = []
    for tier in range(3):
        table = mixed.page_table
        live = torch.where(table.tiers == tier, table.live_tokens, 0).to(torch.int16)
        only = replace(mixed, page_table=replace(table, live_tokens=live))
        parts.append(ada_decode(query, only, 0.1))
    whole = ada_decode(query, mixed, 0.1)
    merged = merge_partial(parts)
    assert (whole.output - merged.output).abs().max() <= 1e-3
    # A kernel of one tier may have wider tables than one of three: it rounds weights once less.
    assert (whole.log_sum_exp - merged.log_sum_exp).abs().max() <= 5e-4


def test_dead_slots_are_not_read() -> None:
    cache = ragged_cache(tier_set(128, 2, 3), lengths=(500, 64))
    query = random_query(cache, 4, seed=10)
    table = cache.page_table
    dead = torch.tensor([3, 9])
    offsets, live, tiers = table.offsets.clone(), table.live_tokens.clone(), table.tiers.clone()
    offsets[dead], live[dead], tiers[dead] = 1 << 60, 0, 99
    broken = replace(
        cache, page_table=replace(table, offsets=offsets, live_tokens=live, tiers=tiers)
    )
    whole = replace(cache, page_table=replace(table, live_tokens=live))
    attention_plan = plan(broken.to("cuda"), 4)
    check_decode(whole, query, attention_plan=attention_plan)


@pytest.mark.parametrize(("head_dim", "group_size"), [(128, 8), (64, 3)])
def test_runs_repeat_bit_for_bit(head_dim: int, group_size: int) -> None:
    cache = ragged_cache(tier_set(head_dim, 2, 3), lengths=(5000, 700)).to("cuda")
    query = random_query(cache, group_size, seed=11).cuda()
    attention_plan = plan(cache, group_size)
    first = ada_decode(query, cache, 0.1, plan=attention_plan)
    for _ in range(5):
        again = ada_decode(query, cache, 0.1, plan=attention_plan)
        assert torch.equal(first.output, again.output)
        assert torch.equal(first.log_sum_exp, again.log_sum_exp)


def test_graph_replay_sees_new_contents() -> None:
    cache = with_tail(ragged_cache(tier_set(128, 3), lengths=(400, 64)), (3, 4), 16, seed=12)
    on_gpu = cache.to("cuda")
    attention_plan = plan(on_gpu, 4)
    query = random_query(cache, 4, seed=12).cuda()
    ada_decode(query, on_gpu, 0.1, plan=attention_plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ada_decode(query, on_gpu, 0.1, plan=attention_plan)
    other = random_query(cache, 4, seed=13)
    query.copy_(other)
    captured.output.fill_(torch.nan)
    assert on_gpu.tail_tokens is not None
    on_gpu.tail_tokens.sub_(1)
    graph.replay()
    torch.cuda.synchronize()
    shorter = replace(cache, tail_tokens=torch.tensor([2, 3], dtype=torch.int32))
    expected = check_decode(shorter, other, softmax_scale=0.1)
    assert torch.equal(captured.output, expected.output)


def check_wide(cache: PagedCache, query: torch.Tensor) -> DecodeResult:
    """Rounding of such logits may change which token wins: they are compared, and the attention
    with what they make of it."""
    on_gpu, scale = cache.to("cuda"), cache.head_dim**-0.5
    result, own = ada_decode(query.cuda(), on_gpu, scale), ada_logits(query.cuda(), on_gpu)
    exact = ada_logits_reference(query, cache)
    live = torch.isfinite(exact.pages)
    pages = own.pages.cpu().to(torch.float64)
    assert float((pages - exact.pages)[live].norm() / exact.pages[live].norm()) <= 1e-3
    expected = decode_from_logits(LogitResult(pages, None), cache, scale)
    # Float32 logits of 1e4 are a thousandth apart, and so are their exponentials.
    output_error, lse_error = errors(result, expected)
    assert output_error <= 5e-3
    assert lse_error <= 1e-2
    return result


@pytest.mark.parametrize(
    "case", ["dominating", "equal", "wide", "zero", "large_radii", "small_values"]
)
@pytest.mark.parametrize("tier", [2, 3, 5, 7])
def test_adversarial_inputs_stay_finite_and_right(case: str, tier: int) -> None:
    tiers = tier_set(128, tier)
    sequence_length, seed = 333, 14
    cache = ragged_cache(tiers, lengths=(sequence_length,), seed=seed)
    from sphkv_kernels.cache_builder import build_cache
    from tests.kernels.cases import random_tokens

    tokens = random_tokens(sequence_length, 2, 128, 1, 32, seed, drop_fraction=0.0)
    keys, values, query_scale = tokens.keys.clone(), tokens.values.clone(), 1.0
    if case == "dominating":
        query = random_query(cache, 4, seed)
        keys[200] = query[0, 0] * 1.5
    elif case == "equal":
        keys[:] = keys[:1]
    elif case == "wide":
        query_scale = 300.0  # scaled logits spread over +-1e4
        keys *= 30
    elif case == "zero":
        keys[:] = 0
        values[::2] = 0
    elif case == "large_radii":
        values *= 4000.0
        keys *= 0.01
    else:
        values *= 1e-3
    cache = build_cache(tiers, 32, (replace(tokens, keys=keys, values=values),), dead_rows="poison")
    query = random_query(cache, 4, seed, scale=query_scale)
    result = check_wide(cache, query) if case == "wide" else check_decode(cache, query)
    assert torch.isfinite(result.output).all()
    assert torch.isfinite(result.log_sum_exp).all()


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("group_size", [1, 4, 12])
def test_logits_and_a_soft_cap_inside_a_window(page_size: int, group_size: int) -> None:
    cache = ragged_cache(tier_set(128, 2, 3, 0, 1), page_size=page_size, lengths=(40, 300, 301))
    cache = with_tail(cache, (3, 20, 0), capacity=32, seed=17)
    query, on_gpu = random_query(cache, group_size, seed=17, scale=2.0), cache.to("cuda")
    now = torch.tensor([320, 310, 305], dtype=torch.int32)
    for window in (1, 20, 100, (1 << 31) - 1):
        check_decode(cache, query, window=window, query_positions=now, logit_softcap=20.0)
        expected = ada_logits_reference(query, cache, window=window, query_positions=now)
        found = ada_logits(query.cuda(), on_gpu, window=window, query_positions=now.cuda())
        for got, want in ((found.pages, expected.pages), (found.tail, expected.tail)):
            assert got is not None and want is not None
            got = got.cpu().to(torch.float64)
            assert torch.equal(torch.isneginf(got), torch.isneginf(want))
            live = torch.isfinite(want)
            assert float((got - want)[live].norm()) <= 1e-3 * float(want[live].norm())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [16, 32])
def test_tables_that_take_turns(head_dim: int, page_size: int) -> None:
    """More codes than have room: a block brings in the tables of a tier when it comes to it."""
    cache = ragged_cache(
        tier_set(head_dim, 0, 2, 3, 4, 5, 6, 7, 8), page_size=page_size, lengths=(900, 5, 333, 64)
    )
    cache = with_tail(cache, (3, 20, 0, 1), capacity=32, seed=18)
    query, on_gpu = random_query(cache, 3, seed=18), cache.to("cuda")
    for n_blocks in (1, 3, 20, 132):
        cut = plan(on_gpu, 3, n_blocks=n_blocks)
        first = check_decode(cache, query, attention_plan=cut)
        kernel = cut.kernel(logits=False, window=False, softcap=False)
        assert "#define TABLE_SETS 8\n" in kernel.source.text
        again = ada_decode(query.cuda(), on_gpu, head_dim**-0.5, plan=cut)
        assert torch.equal(first.output, again.output)
        logits = ada_logits(query.cuda(), on_gpu, plan=cut).pages.cpu().to(torch.float64)
        expected = ada_logits_reference(query, cache).pages
        live = torch.isfinite(expected)
        assert torch.equal(live, torch.isfinite(logits))
        assert float((logits - expected)[live].norm()) <= 1e-3 * float(expected[live].norm())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("tiers", [(4,), (5,), (6, 4), (0, 2, 3, 4, 5, 6, 7, 8)])
def test_kernels_of_a_device_with_little_shared_memory(
    head_dim: int, tiers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer copies of tables, large ones split, as on sm_89: the same numbers, bit by bit."""
    cache = ragged_cache(tier_set(head_dim, *tiers), lengths=(900, 5, 333))
    query = random_query(cache, 3, seed=23, scale=0.8)  # logits within +-30 at head_dim 64
    on_gpu = cache.to("cuda")
    expected = {
        n_blocks: ada_decode(
            query.cuda(), on_gpu, head_dim**-0.5, plan=plan(on_gpu, 3, n_blocks=n_blocks)
        )
        for n_blocks in (2, 40)
    }
    found = torch.cuda.get_device_capability()
    monkeypatch.setitem(variant.SHARED_BYTES, 10 * found[0] + found[1], 99 * 1024)
    launch._load.cache_clear()
    try:
        for n_blocks, whole in expected.items():
            cut = plan(on_gpu, 3, n_blocks=n_blocks)
            split = check_decode(cache, query, attention_plan=cut)
            text = cut.kernel(logits=False, window=False, softcap=False).source.text
            assert "#define SPLIT_ROWS 1\n" in text
            assert torch.equal(split.output, whole.output)
    finally:
        launch._load.cache_clear()


def test_a_tail_that_claims_more_than_its_room_is_read_to_its_end() -> None:
    cache = with_tail(ragged_cache(tier_set(128, 3), lengths=(400, 64)), (16, 16), 16, seed=19)
    on_gpu, query = cache.to("cuda"), random_query(cache, 4, seed=19)
    cut = plan(on_gpu, 4)
    expected = check_decode(cache, query, attention_plan=cut)
    assert on_gpu.tail_tokens is not None
    on_gpu.tail_tokens.fill_(1000)
    found = ada_decode(query.cuda(), on_gpu, 128**-0.5, plan=cut)
    assert torch.equal(found.output, expected.output)


def test_operators_are_registered_as_torch_wants_them() -> None:
    cache = ragged_cache(tier_set(128, 3)).to("cuda")
    query, cut = random_query(cache, 4, seed=20).cuda(), plan(cache, 4)
    tests = ("test_schema", "test_faketensor")
    nothing = (None, None)
    decode, logits = torch.ops.sphkv.ada_decode, torch.ops.sphkv.ada_logits
    torch.library.opcheck(
        decode, (query, cut.handle, 0.1, None, 0.0, 0, None, *nothing), test_utils=tests
    )
    torch.library.opcheck(logits, (query, cut.handle, None, 0, None, *nothing), test_utils=tests)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_mode_that_was_never_run_is_refused_inside_a_capture() -> None:
    # A format that no other test has, so that its kernel is not there.
    cache = ragged_cache(tier_set(128, 7, 3, 0), page_size=64)
    on_gpu, query = cache.to("cuda"), random_query(cache, 2, seed=21).cuda()
    cut = plan(on_gpu, 2, n_warps=11)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(KernelLaunchError, match="run the same step once before"),
        torch.cuda.graph(graph),
    ):
        ada_decode(query, on_gpu, 0.1, plan=cut)
    check_decode(cache, query.cpu(), attention_plan=cut)


def test_a_thread_that_has_not_met_the_device_decodes() -> None:
    cache = ragged_cache(tier_set(128, 2))
    on_gpu, query = cache.to("cuda"), random_query(cache, 4, seed=26).cuda()
    cut = plan(on_gpu, 4)
    expected = ada_decode(query, on_gpu, 0.1, plan=cut)
    torch.empty_like(expected.output)  # memory that the thread finds without a call of the runtime
    found: list[DecodeResult] = []
    thread = Thread(target=lambda: found.append(ada_decode(query, on_gpu, 0.1, plan=cut)))
    thread.start()
    thread.join()
    assert torch.equal(found[0].output, expected.output)


def test_query_tables_without_room_are_refused_when_the_work_is_planned() -> None:
    cache = ragged_cache(tier_set(128, 7, 3)).to("cuda")
    with pytest.raises(PageError, match="do not fit into the device's shared memory"):
        plan(cache, 1, score_form="table")
    assert plan(cache, 1).table_heads == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_cache_on_another_device_than_the_current_one() -> None:
    cache = ragged_cache(tier_set(128, 2, 3))
    query, other = random_query(cache, 4, seed=22), torch.device("cuda", 1)
    here = check_decode(cache, query)
    there = ada_decode(query.to(other), cache.to(other), 128**-0.5)
    assert torch.equal(here.output.cpu(), there.output.cpu())
    assert torch.cuda.current_device() == 0


def test_wrong_arguments_are_refused_before_the_launch() -> None:
    cache = ragged_cache(tier_set(128, 3)).to("cuda")
    query = random_query(cache, 4, seed=15).cuda()
    with pytest.raises(PageError, match="float32, bfloat16 or float16"):
        ada_decode(query.to(torch.float64), cache, 0.1)
    with pytest.raises(PageError, match="query is"):
        ada_decode(query[:, :, :64], cache, 0.1)
    with pytest.raises(PageError, match="lies on cpu"):
        ada_decode(query.cpu(), cache, 0.1)
    with pytest.raises(PageError, match="contiguous"):
        ada_decode(query.transpose(0, 1).contiguous().transpose(0, 1), cache, 0.1)
    with pytest.raises(PageError, match="groups of 4"):
        ada_decode(query[:, :2].contiguous(), cache, 0.1, plan=plan(cache, 4))
    with pytest.raises(PageError, match="1 to 16"):
        plan(cache, 17)
    broken = replace(
        cache, page_table=replace(cache.page_table, offsets=cache.page_table.offsets + (1 << 40))
    )
    with pytest.raises(PageError, match="inside the pool"):
        plan(broken, 4)
    with pytest.raises(PageError, match="window"):
        ada_decode(query, replace(cache, positions=None), 0.1, window=5)
