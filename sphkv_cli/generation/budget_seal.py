"""Sealing under a budget: pages of all layers decided together, older ones coded anew or dropped.

What all layers of a device seal and demote is coded together (`page_demotion.py`,
`layer_store.py`): by layer, a seal would be tens of thousands of small operations.  Source: ours.
"""

from collections.abc import Sequence

import torch

from sphkv_cli.errors import SphkvError
from sphkv_cli.generation.budget_keeper import BudgetKeeper
from sphkv_cli.generation.layer_store import LayerStore, sealed_together
from sphkv_cli.generation.page_demotion import demoted
from sphkv_cli.generation.placement import PolicyRule
from sphkv_cli.generation.store_state import StoreState
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.tier import PageError


def pages_due(
    rule: PolicyRule, keeper: BudgetKeeper, n_sealed: Sequence[int], n_tail: Sequence[int]
) -> list[int]:
    """Pages of every sequence about which the keeper is asked by now."""
    due = [rule.kept_pages(*pair) for pair in zip(n_sealed, n_tail, strict=True)]
    return [
        n if sealed or keeper.can_begin(n * rule.page_size) else 0
        for n, sealed in zip(due, n_sealed, strict=True)
    ]


def sealed_within(
    rule: PolicyRule,
    keeper: BudgetKeeper,
    stores: Sequence[LayerStore],
    states: list[StoreState | None],
) -> None:
    """Seal in all layers what is due, and demote what must make room for it.

    keeper: the cache's own; states: replaced device by device; after an error some are new, and
    the keeper is lost.

    Raises:
        SphkvError: a vector that no code can hold, or an earlier seal failed.
    """
    keeper.require_known()
    first = states[0]
    assert first is not None
    due, is_first = pages_due(rule, keeper, first.n_sealed, first.n_tail), not keeper.is_started
    if not is_first and not any(due):
        return
    try:
        if is_first:
            n_sealed = first.n_sealed
            keeper.start(
                [rule.policy.options_of_pages(n) if n else None for n in n_sealed], n_sealed
            )
        decided = [keeper.place(s, n) for s, n in enumerate(due)]
        for layers in _by_device(states):
            chosen = [stores[layer] for layer in layers]
            moves = [
                [{e: to for (i, e), to in m.items() if i == layer} for _, m in decided]
                for layer in layers
            ]
            placed = [
                [p[layer] if n else None for n, (p, _) in zip(due, decided, strict=True)]
                for layer in layers
            ]
            before = [states[layer] for layer in layers]
            after = sealed_together(chosen, _demoted_states(chosen, before, moves), placed)
            for layer, state in zip(layers, after, strict=True):
                states[layer] = state
    except BaseException:
        # Its books are ahead of the pages now.
        keeper.lose()
        raise


def _by_device(states: Sequence[StoreState | None]) -> list[list[int]]:
    """Layers that lie on one device, together."""
    found: dict[torch.device, list[int]] = {}
    for layer, state in enumerate(states):
        assert state is not None
        found.setdefault(state.tail_keys.device, []).append(layer)
    return list(found.values())


def _demoted_states(
    stores: Sequence[LayerStore],
    states: Sequence[StoreState | None],
    moves: Sequence[Sequence[dict[int, int]]],
) -> list[StoreState]:
    """moves: per layer of every sequence, option by entry counted from the sequence's first."""
    coded = [state for state in states if state is not None]
    where = [i for i, state in enumerate(coded) if state.pages is not None]
    pages = [page for state in coded if (page := state.pages) is not None]
    found = [_by_entry(page, moves[i]) for i, page in zip(where, pages, strict=True)]
    if not any(found):
        return coded
    try:
        changed = demoted(pages, found, uses_kernel=stores[0].uses_kernel)
    except PageError:
        raise  # of the layout, not of a vector
    except ValueError as error:
        for i, page, one in zip(where, pages, found, strict=True):
            try:
                demoted([page], [one], uses_kernel=stores[0].uses_kernel)
            except ValueError as own:
                raise SphkvError(
                    f"layer {stores[i].layer}: a key or value does not fit a smaller code ({own})",
                    "give a larger budget, or allocate with other codes",
                ) from error
        raise
    for i, page in zip(where, changed, strict=True):
        coded[i] = stores[i].with_pages(coded[i], page)
    return coded


def _by_entry(pages: PagedCache, moves: Sequence[dict[int, int]]) -> dict[int, int]:
    if not any(moves):
        return {}
    firsts = pages.page_table.starts[:: pages.n_kv_heads].tolist()
    return {firsts[s] + e: to for s, found in enumerate(moves) for e, to in found.items()}
