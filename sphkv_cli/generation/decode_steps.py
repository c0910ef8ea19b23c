"""A cache while every sequence gets one token at a time: all layers, their clock and their seals.

    advance, then layer by layer (frame, write, attend), then finish: count, and seal what is due

Pages are sealed one by one into slots that are there already (`page_reserve.py`), in all layers
together: first every page is encoded, then all are written, so that a seal that fails changes
nothing.  When the slots are used up all layers get new ones.  Source: ours.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from sphkv_cli.errors import SphkvError
from sphkv_cli.generation.coded_part import LayerReader
from sphkv_cli.generation.layer_store import LayerStore, uncodable
from sphkv_cli.generation.page_reserve import SlotMaker, slots_for
from sphkv_cli.generation.step_clock import StepClock
from sphkv_cli.generation.step_layer import StepLayer
from sphkv_cli.generation.store_state import StoreState

_TAIL_STEP = 32
_epochs = itertools.count()


class DecodeSteps:
    """Use: `begin`, `attend` of every layer, `finish`; or `undo`.

    n_tail, n_sealed, next_position: per sequence, the same in every layer.
    epoch: another number whenever tensors have moved: what was captured before is void.
    is_torn: memory ran out while they moved; only `states` is of use.
    """

    def __init__(
        self, stores: Sequence[LayerStore], readers: Sequence[LayerReader], states: list[StoreState]
    ) -> None:
        """Take over a cache's states, layer by layer: the list loses them, to free their memory.

        On an error the list is whole again.
        """
        first = states[0]
        self._rule, self._head_counts = stores[0].rule, first.tail_keys.shape[1]
        self.n_tail, self.n_sealed = list(first.n_tail), list(first.n_sealed)
        self.next_position = list(first.next_position)
        self._device = first.tail_keys.device
        self.epoch, self._n_used = next(_epochs), [0] * first.n_sequences
        self.is_torn = False
        self._set_room()
        self._layers: list[StepLayer] = []
        with torch.inference_mode(mode=False), torch.no_grad():
            self.clock, self._tails = self._new_clock(), self._new_tails(len(states), first)
            slots = SlotMaker(self._n_slots)
            try:
                for index, (store, reader) in enumerate(zip(stores, readers, strict=True)):
                    self._layers.append(
                        StepLayer.entered(
                            store,
                            reader,
                            states[index],
                            self.clock,
                            self._tails[index],
                            slots,
                        )
                    )
                    states[index] = _EMPTY
            except BaseException:
                for index, state in enumerate(self.states()):
                    states[index] = state
                raise

    @property
    def n_sequences(self) -> int:
        """Sequences of the batch."""
        return len(self.n_tail)

    def begin(self) -> None:
        """A step begins."""
        self.require_row()
        with torch.inference_mode(mode=False), torch.no_grad():
            self.clock.advance()

    def require_row(self) -> None:
        """A tail that a seal should have emptied, and did not, gets room for one more token."""
        if max(self.n_tail) >= self._capacity:
            self.make_room()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `StepLayer.attend`."""
        with torch.inference_mode(mode=False), torch.no_grad():
            return self._layers[layer].attend(query, key, value)

    def finish(self) -> None:
        """Every layer has attended: count the tokens, and seal what is due.

        Raises:
            SphkvError: a vector that no code can hold, or memory that runs out; the tokens are
                in the cache, dense.
        """
        self.n_tail = [n + 1 for n in self.n_tail]
        self.next_position = [p + 1 for p in self.next_position]
        due: dict[tuple[int, int], list[int]] = {}
        for s, (n, used) in enumerate(zip(self.n_tail, self._n_used, strict=True)):
            n_pages = self._rule.steady_pages(n)
            if n_pages:
                due.setdefault((n_pages, used), []).append(s)
        try:
            with torch.inference_mode(mode=False), torch.no_grad():
                if any(used + n > self._n_slots for n, used in due):
                    self._make_room()
                    merged: dict[tuple[int, int], list[int]] = {}
                    for (n_pages, _), chosen in due.items():
                        merged.setdefault((n_pages, 0), []).extend(chosen)
                    due = {key: sorted(chosen) for key, chosen in merged.items()}
                for (n_pages, used), chosen in due.items():
                    self._seal(chosen, n_pages, used)
                if max(self.n_tail) == self._capacity:
                    self._make_room()
        except torch.OutOfMemoryError as error:
            self.clock.set(self.n_tail, self.next_position)
            raise SphkvError(
                "the device ran out of memory while coding new tokens; the cache keeps them dense",
                "give a shorter prompt or a smaller batch",
            ) from error

    def undo(self) -> None:
        """Forget a step that began."""
        self.clock.set(self.n_tail, self.next_position)

    def crop(self, n_gone: int) -> None:
        """Take back tokens of every tail; the caller knows that they are there."""
        self.n_tail = [n - n_gone for n in self.n_tail]
        self.next_position = [p - n_gone for p in self.next_position]
        self.clock.set(self.n_tail, self.next_position)

    def states(self) -> list[StoreState]:
        """The layers as plain states, which share the pages."""
        counts = tuple(self.n_tail), tuple(self.n_sealed), tuple(self.next_position)
        with torch.inference_mode(mode=False), torch.no_grad():
            return [layer.state(*counts) for layer in self._layers]

    def make_room(self) -> int:
        """New slots for every layer, as when they are used up; the tokens that fit into them."""
        with torch.inference_mode(mode=False), torch.no_grad():
            self._make_room()
        return self._n_slots * self._rule.page_size

    @property
    def n_bytes(self) -> int:
        """Bytes of every tensor held."""
        shared: set[int] = set()
        return sum(layer.n_bytes(shared) for layer in self._layers) + self.clock.n_bytes

    def _seal(self, chosen: list[int], n_pages: int, first_slot: int) -> None:
        n = n_pages * self._rule.page_size
        index = self._index(chosen)
        try:
            encoded = [layer.encoded(index, n_pages) for layer in self._layers]
            refused = torch.stack([flag for _, flag in encoded]) != 0
            sound = torch.isfinite(self._tails[:, :, index, :, :n]).flatten(1).all(1) & ~refused
            # The one question to the device in a page of steps.
            if not bool(sound.all()):
                failed = int((~sound).nonzero()[0])
                raise uncodable(failed, "it holds NaN or Inf, or is too large")
        except SphkvError:
            self.clock.set(self.n_tail, self.next_position)
            raise
        pages = [of_layer for of_layer, _ in encoded]
        left = self._tails[:, :, index, :, n:].clone()
        first = torch.tensor([self.next_position[s] - self.n_tail[s] for s in chosen])
        positions = (first[:, None] + torch.arange(n)).to(self._device)
        for layer, new in zip(self._layers, pages, strict=True):
            layer.reserve.fill(new, chosen, first_slot, positions)
        self._tails[:, :, index, :, : left.shape[4]] = left
        for s in chosen:
            self.n_tail[s] -= n
            self.n_sealed[s] += n
            self._n_used[s] += n_pages
        self.clock.set(self.n_tail, self.next_position)

    def _make_room(self) -> None:
        """New slots and a tail long enough, layer by layer: no token changes."""
        self.epoch, self.is_torn = next(_epochs), True
        self._set_room()
        self.clock, old = self._new_clock(), self._tails
        self._tails = old.new_zeros((*old.shape[:4], self._capacity, old.shape[5]))
        n = min(self._capacity, old.shape[4])
        self._tails[:, :, :, :, :n] = old[:, :, :, :, :n]
        slots = SlotMaker(self._n_slots)
        for index, layer in enumerate(self._layers):
            # The old pages of this layer are free before the next ones are made.
            self._layers[index] = layer.rebuilt(
                self.clock, self._tails[index], slots, self.next_position
            )
        self._n_used, self.is_torn = [0] * self.n_sequences, False

    def _set_room(self) -> None:
        n_pages = max(self.n_sealed) // self._rule.page_size
        steady = self._rule.steady_pages(1 << 40) > 0
        self._n_slots = slots_for(n_pages) if steady else 0
        # Where nothing is sealed the tail grows as the tokens come: by half, so that few copies do.
        more = self._rule.page_size if steady else max(self.n_tail) // 2
        self._n_slots += max(self._rule.steady_pages(n) for n in self.n_tail)
        self._capacity = -(-(max(self.n_tail) + more + 1) // _TAIL_STEP) * _TAIL_STEP

    def _index(self, chosen: list[int]) -> slice | Tensor:
        if len(chosen) == self.n_sequences:
            return slice(None)
        return torch.tensor(chosen, device=self._device)

    def _new_tails(self, n_layers: int, first: StoreState) -> Tensor:
        """Rows that hold no token yet are zeros: their number decides what is read."""
        n_kv_heads, _, d = first.tail_keys.shape[1:]
        size = (n_layers, 2, self.n_sequences, n_kv_heads, self._capacity, d)
        return torch.zeros(size, dtype=torch.bfloat16, device=self._device)

    def _new_clock(self) -> StepClock:
        clock = StepClock(self.n_sequences, self._head_counts, self._capacity, self._device)
        clock.set(self.n_tail, self.next_position)
        return clock


_EMPTY = StoreState(None, None, torch.empty(0, 0, 0, 0), torch.empty(0, 0, 0, 0), (), (), ())
