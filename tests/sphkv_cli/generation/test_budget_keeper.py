"""A budget while the cache grows: bytes of the tensors, precision that only falls, what it buys."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sphkv_cli.allocation.options import AllocateOptions
from sphkv_cli.allocation.stage import allocate
from sphkv_cli.errors import SphkvError, UsageError
from sphkv_cli.fit.options import FitOptions
from sphkv_cli.fit.stage import fit_codebooks
from sphkv_cli.generation import layer_store, page_demotion
from sphkv_cli.generation.budget_keeper import BudgetKeeper
from sphkv_cli.generation.layer_store import LayerStore
from sphkv_cli.generation.page_demotion import demoted
from sphkv_cli.generation.page_store import tensor_bytes
from sphkv_cli.generation.placement import PolicyRule
from sphkv_cli.generation.spherical_cache import SphericalCache
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.cache_builder import build_cache
from sphkv_kernels.cache_reader import read_tokens
from sphkv_kernels.encode import encode
from sphkv_kernels.page_slots import SequenceTokens
from sphkv_kernels.tier import TierFormat

N_PROMPT, N_TOKENS = 96, 190


@pytest.fixture(scope="module")
def load(tiny_chain: Any) -> Callable[..., Any]:
    """The captured model, loaded anew in a dtype."""
    from transformers import AutoModelForCausalLM

    def make(dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_chain.model, dtype=dtype).eval()

    return make


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(1, 100, (1, N_TOKENS), generator=torch.Generator().manual_seed(2))


def grown(
    model: Any, cache: SphericalCache, ids: Tensor, after: Callable[[SphericalCache], None]
) -> Tensor:
    """Logits of the tokens after the prompt; `after` sees the cache after every step."""
    rows = []
    with torch.inference_mode():
        model(ids[:, :N_PROMPT], past_key_values=cache)
        after(cache)
        for i in range(N_PROMPT, ids.shape[1]):
            rows.append(model(ids[:, i : i + 1], past_key_values=cache).logits[0, -1])
            after(cache)
    return torch.stack(rows)


def laid_out(cache: SphericalCache) -> int:
    """Bytes of the tensors of pages and tables, and of the fixed tables."""
    assert isinstance(cache.rule, PolicyRule)
    pages = [state.pages for state in cache.states() if state is not None]
    return cache.rule.policy.layout.fixed_bytes + sum(tensor_bytes(p) for p in pages if p)


def keeper_of(cache: SphericalCache) -> BudgetKeeper:
    assert cache._keeper is not None
    return cache._keeper


def require_books_are_pages(cache: SphericalCache) -> None:
    """The keeper's options are the tiers of the page tables, and within the budget."""
    keeper, states = keeper_of(cache), cache.states()
    (sequence,) = keeper._sequences
    for layer, state in enumerate(states):
        assert state is not None
        of_layer = np.concatenate(sequence.ids[layer])
        tiers = [] if state.pages is None else state.pages.page_table.tiers.tolist()
        assert tiers == (sequence.growth.options[of_layer] - 1).tolist()
    assert states[0] is not None
    assert laid_out(cache) <= keeper.schedule.budget_bytes(states[0].n_sealed[0])


@pytest.mark.parametrize(
    "budget, shrink, dtype",
    [
        ("30kB", (), torch.float32),
        ("4b", ((120, 0.6), (150, 0.8)), torch.float32),
        ("2.5b", (), torch.bfloat16),
    ],
)
def test_no_seal_leaves_more_than_the_budget_and_no_page_gains_precision(
    tiny_chain: Any,
    load: Callable[..., Any],
    ids: Tensor,
    budget: str,
    shrink: Sequence[tuple[int, float]],
    dtype: torch.dtype,
) -> None:
    model = load(dtype)
    cache = SphericalCache.from_policy(
        tiny_chain.allocation, model, window=8, budget=budget, shrink=shrink
    )
    keeper = keeper_of(cache)
    seals: list[int] = []
    before, n_demoted = np.zeros(0, np.int8), 0

    def check(cache: SphericalCache) -> None:
        nonlocal before, n_demoted
        states = [state for state in cache.states() if state is not None]
        n_sealed = states[0].n_sealed[0]
        if seals and n_sealed == seals[-1]:
            return
        seals.append(n_sealed)
        assert laid_out(cache) <= keeper.schedule.budget_bytes(n_sealed)
        (sequence,) = keeper._sequences
        options = sequence.growth.options
        assert (options[: before.size] <= before).all()
        n_demoted += int((options[: before.size] < before).sum())
        before = options
        for layer, state in enumerate(states):
            assert state.pages is not None
            of_layer = np.concatenate(sequence.ids[layer])
            assert state.pages.page_table.tiers.tolist() == (options[of_layer] - 1).tolist()

    logits = grown(model, cache, ids, check)
    assert torch.isfinite(logits).all()
    # Pages of 16 beyond a window of 8, none of them lost.
    assert len(seals) >= 6 and seals[-1] > N_TOKENS - 8 - 16
    # The budget binds, and is used.
    assert n_demoted > 0 and laid_out(cache) > 0.9 * keeper.schedule.budget_bytes(seals[-1])


@pytest.fixture(scope="module")
def crossed(tiny_chain: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An allocation whose tiers do not lose less with every byte: good keys, then good values."""
    folder = tmp_path_factory.mktemp("crossed")
    codes = ("4/1/1/1:r1", "3/1/1/1:r1", "5/3/3/3:r3", "4/2/2/2:r2")
    tiers = (
        "polar-3111-r1/polar-5333-r3",
        "polar-5333-r3/polar-4111-r1",
        "polar-4222-r2/polar-4222-r2",
    )
    fit_codebooks(FitOptions(codes=codes, tiers=tiers), tiny_chain.capture, folder / "books.h5")
    allocate(
        AllocateOptions(budget="3b", page_size=16, horizon=40, window=32, utility="window"),
        tiny_chain.capture,
        folder / "books.h5",
        folder / "allocation.h5",
    )
    return folder / "allocation.h5"


@pytest.mark.parametrize("budget, n_prompt", [("4b", 112), ("6b", 88), ("20kB", 120)])
def test_the_budget_holds_where_a_larger_tier_loses_more(
    crossed: Path, load: Callable[..., Any], ids: Tensor, budget: str, n_prompt: int
) -> None:
    model = load()
    cache = SphericalCache.from_policy(crossed, model, window=8, budget=budget)
    with torch.inference_mode():
        model(ids[:, :n_prompt], past_key_values=cache)
        require_books_are_pages(cache)
        for i in range(n_prompt, N_TOKENS):
            model(ids[:, i : i + 1], past_key_values=cache)
            require_books_are_pages(cache)


def test_a_seal_that_fails_leaves_all_layers_alike_and_takes_no_more_tokens(
    tiny_chain: Any, load: Callable[..., Any], ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(torch.bfloat16)
    cache = SphericalCache.from_policy(tiny_chain.allocation, model, window=8, budget="6b")
    with_sealed = LayerStore.with_sealed

    def interrupted(self: LayerStore, *arguments: Any) -> Any:
        if self.layer == 1:
            raise KeyboardInterrupt
        return with_sealed(self, *arguments)

    with torch.inference_mode():
        model(ids[:, :64], past_key_values=cache)
        monkeypatch.setattr(LayerStore, "with_sealed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            for i in range(64, N_TOKENS):
                model(ids[:, i : i + 1], past_key_values=cache)
        monkeypatch.undo()
        n_columns = cache.n_columns
        counts = {(s.n_tail, s.n_sealed, s.next_position) for s in cache.states() if s is not None}
        # The last token is there, in every layer.
        assert len(counts) == 1 and counts.pop()[2] == (n_columns,)
        for _ in range(2):
            with pytest.raises(SphkvError, match="no longer knows its pages"):
                model(ids[:, :1], past_key_values=cache)
            assert cache.n_columns == n_columns
        cache.reset()
        model(ids[:, :64], past_key_values=cache)
    require_books_are_pages(cache)


def test_a_vector_that_no_code_holds_names_its_layer(
    tiny_chain: Any, load: Callable[..., Any], ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load()
    cache = SphericalCache.from_policy(tiny_chain.allocation, model, window=8, budget="6b")
    placed = LayerStore.tokens_placed

    def broken(self: LayerStore, *arguments: Any) -> Any:
        tokens = placed(self, *arguments)
        if self.layer == 1:
            tokens = [replace(one, keys=one.keys * torch.nan) for one in tokens]
        return tokens

    with torch.inference_mode():
        model(ids[:, :64], past_key_values=cache)
        monkeypatch.setattr(LayerStore, "tokens_placed", broken)
        with pytest.raises(SphkvError, match="layer 1: a key or value cannot be coded"):
            for i in range(64, N_TOKENS):
                model(ids[:, i : i + 1], past_key_values=cache)


def test_layers_are_demoted_together_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    d, page = 32, 16
    code = SphericalCode.analytic("paper", d, (4, 2, 2, 2), "fp16")
    tiers = (TierFormat.spherical(code), TierFormat.int8(), TierFormat.dense())
    generator, caches = torch.Generator().manual_seed(1), []
    for n in (40, 64, 33):
        keys, values = (torch.randn((n, 2, d), generator=generator) for _ in range(2))
        number = (torch.arange(n) // page)[:, None].expand(-1, 2)
        positions = torch.arange(n) if n == 64 else None
        tokens = SequenceTokens(keys, values, 2 - number % 2, number, positions)
        caches.append(build_cache(tiers, page, [tokens]))
    moves = [{0: 1, 3: 2, 5: 0}, {}, {1: 0, 2: 1}]
    found = demoted(caches, moves)
    assert found[1] is caches[1]
    for cache, move, one in zip(caches, moves, found, strict=True):
        (alone,) = demoted([cache], [move])
        assert torch.equal(one.pool, alone.pool)
        assert one.page_table.equals(alone.page_table)
    assert [int(one.page_table.n_entries) for one in found] == [5, 8, 5]
    # Few at a time, where they are many, are the same bytes; drops alone code nothing.
    monkeypatch.setattr(page_demotion, "CODED_AT_ONCE", 1)
    for one, other in zip(demoted(caches, moves), found, strict=True):
        assert torch.equal(one.pool, other.pool) and one.page_table.equals(other.page_table)
    (dropped,) = demoted(caches[:1], [{0: 0, 4: 0}])
    assert dropped.page_table.n_entries == caches[0].page_table.n_entries - 2


def test_a_large_seal_is_coded_some_layers_at_a_time(
    tiny_chain: Any, load: Callable[..., Any], ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found, calls = load(), [], []
    whole = layer_store.build_caches

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(len(arguments[2]))
        return whole(*arguments, **options)

    monkeypatch.setattr(layer_store, "build_caches", counted)
    for at_once in (layer_store.CODED_AT_ONCE, 1):
        monkeypatch.setattr(layer_store, "CODED_AT_ONCE", at_once)
        cache = SphericalCache.from_policy(tiny_chain.allocation, model, window=8, budget="3b")
        with torch.inference_mode():
            model(ids[:, :N_PROMPT], past_key_values=cache)
            calls.clear()
            model(ids[:, N_PROMPT:], past_key_values=cache)
        assert max(calls) == (1 if at_once == 1 else cache.geometry.n_layers)
        found.append([s.pages for s in cache.states() if s is not None and s.pages is not None])
        require_books_are_pages(cache)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.pool, other.pool) and one.page_table.equals(other.page_table)


def test_caches_of_one_rule_keep_their_own_books(
    tiny_chain: Any, load: Callable[..., Any], ids: Tensor
) -> None:
    model = load()
    first = SphericalCache.from_policy(tiny_chain.allocation, model, window=8, budget="3b")
    with torch.inference_mode():
        model(ids[:, :N_PROMPT], past_key_values=first)
        second = SphericalCache(model, first.rule)
        model(ids[:, :64], past_key_values=second)
        for i in range(N_PROMPT, 150):
            model(ids[:, i : i + 1], past_key_values=first)
            require_books_are_pages(first)
    require_books_are_pages(second)


def test_nothing_is_sealed_while_tables_eat_the_budget(
    tiny_chain: Any, load: Callable[..., Any], ids: Tensor
) -> None:
    model = load()
    cache = SphericalCache.from_policy(tiny_chain.allocation, model, window=8, budget="1.5b")
    assert isinstance(cache.rule, PolicyRule)
    tables = cache.rule.policy.layout.overhead_bytes()
    with torch.inference_mode():
        model(ids[:, :40], past_key_values=cache)
        n_sealed = []
        for i in range(40, N_TOKENS):
            model(ids[:, i : i + 1], past_key_values=cache)
            state = cache.states()[0]
            assert state is not None
            n_sealed.append(state.n_sealed[0])
    assert n_sealed[0] == 0 < n_sealed[-1]
    least = min(n for n in n_sealed if n)
    assert keeper_of(cache).schedule.budget_bytes(least) >= 2 * tables
    require_books_are_pages(cache)


def test_more_bytes_stray_less_from_the_dense_cache(
    tiny_chain: Any, load: Callable[..., Any], ids: Tensor
) -> None:
    model = load()
    with torch.inference_mode():
        dense = model(ids).logits[0, N_PROMPT:].log_softmax(-1)
    found = []
    for budget in ("1.5b", "5b"):
        cache = SphericalCache.from_policy(tiny_chain.allocation, model, window=8, budget=budget)
        coded = grown(model, cache, ids, lambda _: None).log_softmax(-1)
        found.append(float((dense.exp() * (dense - coded)).sum(-1).mean()))
    assert found[0] > 4 * found[1] > 0


def test_a_demoted_page_holds_what_it_held_in_a_smaller_code() -> None:
    d, page = 32, 16
    code = SphericalCode.analytic("paper", d, (4, 2, 2, 2), "fp16")
    tiers = (TierFormat.spherical(code), TierFormat.int8())
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn((40, 2, d), generator=generator) for _ in range(2))
    number = (torch.arange(40) // page)[:, None].expand(-1, 2)
    tokens = SequenceTokens(keys, values, torch.ones_like(number), number, torch.arange(40))
    cache = build_cache(tiers, page, [tokens])
    # Head 0: its second page is dropped and its third, of 8 tokens, demoted; head 1: its first.
    (found,) = demoted([cache], [{1: 0, 2: 1, 3: 1}])
    assert found.page_table.tiers.tolist() == [1, 0, 0, 1, 1]
    assert found.page_table.live_tokens.tolist() == [16, 8, 16, 16, 8]
    sizes = found.tier_page_bytes()
    assert found.pool.numel() == 2 * sizes[0] + 3 * sizes[1] < cache.pool.numel()
    old, new = read_tokens(cache, 0, 40), read_tokens(found, 0, 40)
    assert not new.kept[16:32, 0].any() and int(new.kept.sum()) == 80 - 16
    untouched = torch.ones((40, 2), dtype=torch.bool)
    untouched[16:, 0] = untouched[:16, 1] = False
    assert torch.equal(new.keys[untouched], old.keys[untouched])
    # The bytes are those of the int8 numbers coded anew.
    first = slice(0, page)
    coded = encode(tiers[0], old.keys[None, first, 1].float(), old.values[None, first, 1].float())[
        0
    ]
    offset = int(found.page_table.offsets[2])
    assert torch.equal(found.pool[offset : offset + coded.numel()], coded)
    live = (old.keys[32:, 0] - new.keys[32:, 0]).norm() / old.keys[32:, 0].norm()
    assert 0.05 < float(live) < 0.3


def test_what_no_budget_is_kept_of_is_refused(
    tiny_chain: Any, load: Callable[..., Any], ids: Tensor
) -> None:
    model = load()
    with pytest.raises(UsageError, match="none to shrink"):
        SphericalCache.from_policy(tiny_chain.allocation, model, shrink=((10, 0.5),))
    with pytest.raises(UsageError, match="of tables"):
        SphericalCache.from_policy(tiny_chain.allocation, model, budget="1kB")
    with pytest.raises(UsageError, match="of tables"):
        SphericalCache.from_policy(
            tiny_chain.allocation, model, budget="30kB", shrink=((100, 0.01),)
        )
    with pytest.raises(UsageError, match="factors"):
        SphericalCache.from_policy(tiny_chain.allocation, model, budget="2b", shrink=((10, 2.0),))
    cache = SphericalCache.from_policy(tiny_chain.allocation, model, budget="3b")
    with torch.inference_mode():
        model(ids[:, :N_PROMPT], past_key_values=cache)
    with pytest.raises(SphkvError, match="beams"):
        cache.reorder_cache(torch.tensor([0]))


def test_pins_are_not_kept_by_a_growing_budget(
    tiny_chain: Any, load: Callable[..., Any], tmp_path: Path
) -> None:
    pinned = tmp_path / "pinned.h5"
    options = AllocateOptions(
        budget="8b", page_size=16, horizon=40, window=32, utility="window", pin_first=4
    )
    allocate(options, tiny_chain.capture, tiny_chain.codebooks, pinned)
    with pytest.raises(UsageError, match="pins tokens"):
        SphericalCache.from_policy(pinned, load(), budget="8b")
    SphericalCache.from_policy(pinned, load())


def test_steps_without_a_seal_only_make_the_tail_longer(
    tiny_chain: Any, load: Callable[..., Any], ids: Tensor
) -> None:
    model = load(torch.bfloat16)
    cache = SphericalCache.from_policy(tiny_chain.allocation, model, window=None)
    tails: list[int] = []
    logits = grown(model, cache, ids[:, :150], lambda c: tails.append(c.memory_bytes()))
    assert torch.isfinite(logits).all() and cache._steps is not None
    assert cache._steps.n_tail == [150 - N_PROMPT] and cache._steps.n_sealed == [N_PROMPT]
    # Longer by half at a time: few copies.
    assert 2 <= len(set(tails)) <= 8
