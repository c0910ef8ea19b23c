"""Sealing under a budget: pages of all layers decided together, older ones coded anew or dropped.

A demoted page is read back and coded again: its error is that of both codes.  Source: ours.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sphkv_cli.errors import SphkvError
from sphkv_cli.generation.budget_keeper import BudgetKeeper
from sphkv_cli.generation.layer_store import LayerStore
from sphkv_cli.generation.page_store import compacted, kept
from sphkv_cli.generation.placement import PolicyRule
from sphkv_cli.generation.store_state import StoreState
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.encode import encode
from sphkv_kernels.page_logits import tier_pages


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

    keeper: the cache's own; states: replaced one by one; after an error some are new, and the
    keeper is lost.

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
        for layer, store in enumerate(stores):
            state = states[layer]
            assert state is not None
            moves = [{e: to for (i, e), to in m.items() if i == layer} for _, m in decided]
            if state.pages is not None:
                try:
                    pages = _demoted_by_sequence(state.pages, moves, store.uses_kernel)
                except ValueError as error:
                    raise SphkvError(
                        f"layer {layer}: a key or value does not fit a smaller code ({error})",
                        "give a larger budget, or allocate with other codes",
                    ) from error
                state = store.with_pages(state, pages)
            placed = [p[layer] if n else None for n, (p, _) in zip(due, decided, strict=True)]
            states[layer] = store.sealed(state, placed)
    except BaseException:
        # Its books are ahead of the pages now.
        keeper.lose()
        raise


def _demoted_by_sequence(
    pages: PagedCache, moves: Sequence[dict[int, int]], uses_kernel: bool
) -> PagedCache:
    """As `demoted`; moves: of every sequence, by entry counted from its first."""
    if not any(moves):
        return pages
    firsts = pages.page_table.starts[:: pages.n_kv_heads].tolist()
    by_entry = {firsts[s] + e: to for s, found in enumerate(moves) for e, to in found.items()}
    return demoted(pages, by_entry, uses_kernel=uses_kernel)


def demoted(pages: PagedCache, moves: dict[int, int], *, uses_kernel: bool = True) -> PagedCache:
    """Pages with some in smaller tiers, or gone.

    Args:
        moves: option by entry of the page table; 0 drops, option j is tier j - 1.
        uses_kernel: as `encode`.
    """
    if not moves:
        return pages
    table = pages.page_table
    offsets, tiers = table.offsets.clone(), table.tiers.clone()
    option = torch.full((table.n_entries,), -1, dtype=torch.int64)
    option[list(moves)] = torch.tensor(list(moves.values()))
    option = option.to(pages.device)
    pools, end = [pages.pool], pages.pool.numel()
    for tier in range(len(pages.tiers)):
        where = torch.nonzero(option == tier + 1).flatten()
        if not where.numel():
            continue
        keys, values = _read_back(kept(pages, option == tier + 1))
        new = encode(pages.tiers[tier], keys, values, uses_kernel=uses_kernel)
        offsets[where] = end + new.shape[1] * torch.arange(where.numel(), device=pages.device)
        tiers[where] = tier
        pools.append(new.flatten())
        end += new.numel()
    moved = replace(
        pages, pool=torch.cat(pools), page_table=replace(table, offsets=offsets, tiers=tiers)
    )
    return compacted(kept(moved, option != 0))


def _read_back(pages: PagedCache) -> tuple[Tensor, Tensor]:
    """Keys, values (n_entries, page_size, d) float32 in the frame; ones in dead rows."""
    size = (pages.page_table.n_entries, pages.page_size, pages.head_dim)
    found = []
    for operand in ("key", "value"):
        rows = torch.ones(size, dtype=torch.float32, device=pages.device)
        for part in tier_pages(pages, operand):
            rows[part.entries] = part.decode()[part.page_of_entry].float()
        found.append(rows)
    live = torch.arange(pages.page_size, device=pages.device)
    dead = (live >= pages.page_table.live_tokens[:, None])[..., None]
    return found[0].masked_fill(dead, 1.0), found[1].masked_fill(dead, 1.0)
