"""What one layer keeps: pages of codes, and a dense tail of the newest tokens of each sequence.

A token waits in the tail as the model made it; the rule (`placement.py`) moves the oldest of them
onto pages, which are never opened again.  States are values: a step makes a new one, so that a step
that fails is undone by keeping the old.  Source: ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sphkv_cli.allocation.layout import position_bytes
from sphkv_cli.errors import SphkvError
from sphkv_cli.generation.page_store import CODED_AT_ONCE, compacted, joined, kept
from sphkv_cli.generation.placed_tokens import Placement
from sphkv_cli.generation.placement import PlacementRule
from sphkv_cli.generation.store_state import NewTokens, PagePlan, StoreState
from sphkv_codebooks.errors import CodeError
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.cache_builder import build_caches
from sphkv_kernels.page_slots import SequenceTokens
from sphkv_kernels.tier import PageError

_TAIL_STEP = 32


@dataclass(frozen=True, eq=False)
class LayerStore:
    """How one layer's tokens are kept; `window`: of a sliding-window layer, else 0.

    group_size: query heads per KV head; uses_kernel: pages are planned for the CUDA kernel;
    max_tokens: the model's context, decides how wide stored positions are.
    """

    rule: PlacementRule
    layer: int
    window: int
    group_size: int
    uses_kernel: bool
    max_tokens: int

    @property
    def position_dtype(self) -> torch.dtype:
        """uint16 where every position of the model fits."""
        return torch.uint16 if position_bytes(self.max_tokens) == 2 else torch.int32

    @property
    def stores_positions(self) -> bool:
        """Whether pages carry positions: a sliding window, or a frame that needs them."""
        return self.window > 0 or self.rule.frames.needs_positions(self.layer)

    def appended(
        self, state: StoreState | None, keys: Tensor, values: Tensor, tokens: NewTokens
    ) -> StoreState:
        """The state with new tokens in its tail; keys, values (n_sequences, n_kv_heads, n, d)."""
        n_new = [len(columns) for columns in tokens.stored]
        if state is None:
            empty = keys.new_empty((keys.shape[0], keys.shape[1], 0, keys.shape[3]))
            zeros = (0,) * keys.shape[0]
            state = StoreState(None, None, empty, empty, zeros, zeros, tokens.first_position)
        n_tail = tuple(n + more for n, more in zip(state.n_tail, n_new, strict=True))
        tail_keys = _with_room(state.tail_keys, max(state.n_tail), max(n_tail))
        tail_values = _with_room(state.tail_values, max(state.n_tail), max(n_tail))
        if tokens.is_one_each and len(set(state.n_tail)) == 1:
            tail_keys[:, :, state.n_tail[0]] = keys[:, :, 0]
            tail_values[:, :, state.n_tail[0]] = values[:, :, 0]
        else:
            for s, columns in enumerate(tokens.stored):
                rows = slice(state.n_tail[s], n_tail[s])
                tail_keys[s, :, rows] = keys[s][:, list(columns)]
                tail_values[s, :, rows] = values[s][:, list(columns)]
        following = tuple(
            first + more if more else before
            for first, more, before in zip(
                tokens.first_position, n_new, state.next_position, strict=True
            )
        )
        return replace(
            state,
            tail_keys=tail_keys,
            tail_values=tail_values,
            n_tail=n_tail,
            next_position=following,
        )

    def prompt_placed(self, state: StoreState, queries: Sequence[Tensor]) -> StoreState:
        """The state after the prompt was read; queries: those asked for, (n, n_q_heads, d) each."""
        placements = []
        for s, n_tail in enumerate(state.n_tail):
            keys, values, positions = self.tail(state, s, n_tail)
            found = None
            if n_tail:
                found = self.rule.place_prompt(self.layer, queries[s], keys, values, positions)
            placements.append(found)
        return self.sealed(state, placements)

    def later_placed(self, state: StoreState) -> StoreState:
        """The state with whatever the rule seals by now."""
        n_kv_heads = state.tail_keys.shape[1]
        counts = zip(state.n_sealed, state.n_tail, strict=True)
        return self.sealed(state, [self.rule.place_later(*pair, n_kv_heads) for pair in counts])

    def with_pages(self, state: StoreState, pages: PagedCache) -> StoreState:
        """The state with other pages for the same tokens."""
        return self._planned(replace(state, pages=pages))

    def selected(self, state: StoreState, sequences: Sequence[int]) -> StoreState:
        """Sequence i is sequence sequences[i] of `state`; pages are shared until the next seal."""
        index = torch.tensor(list(sequences), device=state.tail_keys.device)

        def pick(values: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(values[s] for s in sequences)

        pages = None if state.pages is None else state.pages.select_sequences(list(sequences))
        return self._planned(
            StoreState(
                pages,
                None,
                state.tail_keys[index],
                state.tail_values[index],
                pick(state.n_tail),
                pick(state.n_sealed),
                pick(state.next_position),
            )
        )

    def filled(
        self,
        pages: PagedCache | None,
        keys: Tensor,
        values: Tensor,
        tokens: NewTokens,
        n_sealed: int,
    ) -> StoreState:
        """A state of given pages, which hold the first n_sealed tokens, and a tail after them."""
        state = self.appended(None, keys, values, tokens)
        every = (n_sealed,) * state.n_sequences
        following = tuple(n_sealed + n for n in state.n_tail)
        return self._planned(replace(state, pages=pages, n_sealed=every, next_position=following))

    def tail(self, state: StoreState, s: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first n tokens of a tail: keys, values (n, n_kv_heads, d) float32, positions (n)."""
        first = state.next_position[s] - state.n_tail[s]
        positions = torch.arange(first, first + n, device=state.tail_keys.device)
        keys = state.tail_keys[s, :, :n].transpose(0, 1).float()
        return keys, state.tail_values[s, :, :n].transpose(0, 1).float(), positions

    def sealed(self, state: StoreState, placements: Sequence[Placement | None]) -> StoreState:
        """The state with the first tokens of every tail on pages as placed, per sequence.

        Raises:
            SphkvError: a vector that its tier cannot hold.
        """
        return sealed_together([self], [state], [placements])[0]

    def tokens_placed(
        self, state: StoreState, placements: Sequence[Placement | None]
    ) -> list[SequenceTokens]:
        """The first tokens of every tail in the frame, and where each goes."""
        device = state.tail_keys.device
        sequences = []
        for s, placement in enumerate(placements):
            n = 0 if placement is None else placement.n_placed
            keys, values, positions = self.tail(state, s, n)
            if placement is None:
                nothing = torch.zeros((0, keys.shape[1]), dtype=torch.int64, device=device)
                tiers, numbers = nothing, nothing
            else:
                tiers = placement.tier_of_token.to(device)
                numbers = placement.page_of_token.to(device)
            if self.window:
                # The next query no longer sees them.
                gone = positions <= state.next_position[s] - self.window
                tiers = tiers.masked_fill(gone[:, None], -1)
            frames = self.rule.frames
            sequences.append(
                SequenceTokens(
                    frames.keys_to_frame(self.layer, keys, positions),
                    frames.values_to_frame(values),
                    tiers,
                    numbers,
                    positions if self.stores_positions else None,
                )
            )
        return sequences

    def with_sealed(
        self, state: StoreState, new: PagedCache, placements: Sequence[Placement | None]
    ) -> StoreState:
        """The state with what was placed in new pages behind its own."""
        pages = new if state.pages is None else joined(state.pages, new)
        n_placed = [0 if p is None else p.n_placed for p in placements]
        n_tail = tuple(n - gone for n, gone in zip(state.n_tail, n_placed, strict=True))
        return self._planned(
            replace(
                state,
                pages=compacted(self.reachable(pages, state.next_position)),
                plan=None,
                tail_keys=_shifted(state.tail_keys, n_placed, n_tail),
                tail_values=_shifted(state.tail_values, n_placed, n_tail),
                n_tail=n_tail,
                n_sealed=tuple(n + m for n, m in zip(state.n_sealed, n_placed, strict=True)),
            )
        )

    def reachable(self, pages: PagedCache, next_position: Sequence[int]) -> PagedCache:
        """Without the pages that lie wholly behind a sliding window, per sequence."""
        if not self.window or pages.positions is None:
            return pages
        sequence = pages.page_table.head_of_entry() // pages.n_kv_heads
        first = torch.tensor(next_position, device=pages.device) - self.window + 1
        rows = torch.arange(pages.page_size, device=pages.device)
        dead = rows >= pages.page_table.live_tokens[:, None]
        last = pages.positions.to(torch.int64).masked_fill(dead, -1).amax(dim=1)
        return kept(pages, last >= first[sequence])

    def _planned(self, state: StoreState) -> StoreState:
        made = PagePlan.of(state.pages, self.group_size if self.uses_kernel else None)
        return replace(state, plan=made)


def sealed_together(
    stores: Sequence[LayerStore],
    states: Sequence[StoreState],
    placements: Sequence[Sequence[Placement | None]],
) -> list[StoreState]:
    """As `LayerStore.sealed` of every layer, of one rule and device: the pages of many are coded at
    once, as far as they are few.

    Raises:
        SphkvError: a vector that its tier cannot hold.
    """
    if all(placement is None for placed in placements for placement in placed):
        return list(states)
    first, every = stores[0], list(zip(stores, states, placements, strict=True))
    n_placed = sum(one.n_placed for one in placements[0] if one is not None)
    n_kv_heads, d = states[0].tail_keys.shape[1], states[0].tail_keys.shape[3]
    step = max(CODED_AT_ONCE // max(n_placed * n_kv_heads * d, 1), 1)
    new: list[PagedCache] = []
    try:
        for start in range(0, len(every), step):
            new += build_caches(
                first.rule.tiers,
                first.rule.page_size,
                [
                    store.tokens_placed(state, placed)
                    for store, state, placed in every[start : start + step]
                ],
                position_dtype=first.position_dtype,
                uses_kernel=first.uses_kernel,
            )
    except PageError:
        raise  # of the layout, not of a vector
    except (CodeError, ValueError) as error:
        if len(every) > 1:
            for store, state, placed in every:
                store.sealed(state, placed)  # raises for the layer that it was
        raise uncodable(first.layer, str(error)) from error
    return [
        store.with_sealed(state, pages, placed)
        for (store, state, placed), pages in zip(every, new, strict=True)
    ]


def uncodable(layer: int, why: str) -> SphkvError:
    """What to say of a vector that no code can hold."""
    return SphkvError(
        f"layer {layer}: a key or value cannot be coded ({why})",
        "run the model in float32 or bfloat16, or check its weights",
    )


def _with_room(tail: Tensor, n_live: int, n_needed: int) -> Tensor:
    """The tail itself, or a longer copy; rows beyond n_live may hold anything."""
    if n_needed <= tail.shape[2]:
        return tail
    capacity = -(-n_needed // _TAIL_STEP) * _TAIL_STEP
    longer = tail.new_empty((*tail.shape[:2], capacity, tail.shape[3]))
    longer[:, :, :n_live] = tail[:, :, :n_live]
    return longer


def _shifted(tail: Tensor, n_gone: Sequence[int], n_left: Sequence[int]) -> Tensor:
    """A tail without its first rows, in memory of its own."""
    capacity = -(-max(n_left) // _TAIL_STEP) * _TAIL_STEP
    shorter = tail.new_empty((*tail.shape[:2], capacity, tail.shape[3]))
    for s, (gone, left) in enumerate(zip(n_gone, n_left, strict=True)):
        shorter[s, :, :left] = tail[s, :, gone : gone + left]
    return shorter
