"""One layer while tokens come one by one: its pages with room for more, and its tail in the frame.

A step is one launch that takes query, key and value into the frame, the new row into the tail, one
that attends to pages and tail in one softmax, and one that takes the output back.  Nothing of it
waits for the device or depends on a number of the host, so it can be captured in a CUDA graph.
Source: ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sphkv_cli.generation.coded_part import LayerReader
from sphkv_cli.generation.layer_store import LayerStore, uncodable
from sphkv_cli.generation.page_reserve import PageReserve, SlotMaker
from sphkv_cli.generation.page_store import kept
from sphkv_cli.generation.step_clock import StepClock
from sphkv_cli.generation.store_state import PagePlan, StoreState
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.decode import ada_decode
from sphkv_kernels.encode import encode_flagged, prepare_encode
from sphkv_kernels.page_table import PageTable
from sphkv_kernels.reference import ada_decode_reference
from sphkv_kernels.tier import PageError


@dataclass(frozen=True, eq=False)
class StepLayer:
    """tail: (2, n_sequences, n_kv_heads, capacity, d) bfloat16, keys then values, in the frame; it
    is part of one tensor for all layers.  reserve.pages carries it as its tail.
    """

    store: LayerStore
    reader: LayerReader
    clock: StepClock
    tail: Tensor
    reserve: PageReserve

    @staticmethod
    def entered(
        store: LayerStore,
        reader: LayerReader,
        state: StoreState,
        clock: StepClock,
        tail: Tensor,
        slots: SlotMaker,
    ) -> "StepLayer":
        """A layer that kept its tail as the model made it; `tail` is filled from it."""
        n_sequences, n_kv_heads, _, d = state.tail_keys.shape
        device, frames = state.tail_keys.device, store.rule.frames
        for s, n in enumerate(state.n_tail):
            keys, values, positions = store.tail(state, s, n)
            framed = frames.keys_to_frame(store.layer, keys, positions)
            tail[0, s, :, :n] = framed.transpose(0, 1)
            tail[1, s, :, :n] = frames.values_to_frame(values).transpose(0, 1)
        pages = state.pages
        if pages is None:
            pages = _no_pages(store, n_sequences, n_kv_heads, d, device)
        return StepLayer._made(store, reader, clock, tail, pages, slots)

    def rebuilt(
        self,
        clock: StepClock,
        tail: Tensor,
        slots: SlotMaker,
        next_position: Sequence[int],
    ) -> "StepLayer":
        """The same tokens with new slots, in a tail that holds them already.

        next_position: of every sequence; pages behind a sliding window are freed.
        """
        pages = self.store.reachable(_without_tail(self.reserve.pages), next_position)
        return StepLayer._made(self.store, self.reader, clock, tail, pages, slots)

    @staticmethod
    def _made(
        store: LayerStore,
        reader: LayerReader,
        clock: StepClock,
        tail: Tensor,
        pages: PagedCache,
        slots: SlotMaker,
    ) -> "StepLayer":
        with_tail = replace(
            pages,
            tail_keys=tail[0],
            tail_values=tail[1],
            tail_tokens=clock.tail_tokens,
            tail_positions=clock.tail_positions,
        )
        group_size = store.group_size if store.uses_kernel else None
        reserve = slots.reserve(with_tail, store.rule.later_tier, group_size)
        made = StepLayer(store, reader, clock, tail, reserve)
        made._load_kernels()
        return made

    def _load_kernels(self) -> None:
        """A step that a CUDA graph captures cannot, and no seal should wait for a compiler."""
        frame, described, plan = self.reader.frame, self.reader.described, self.reserve.plan
        frame.prepare(self.tail.shape[1])
        if self.store.uses_kernel:
            rule = self.store.rule
            prepare_encode(rule.tiers[rule.later_tier], self.tail.shape[4], self.tail.device)
        if plan is not None:
            plan.kernel(
                logits=False,
                window=described.window > 0,
                softcap=described.logit_softcap > 0.0,
                n_position_pairs=frame.tensors.n_pairs,
            )

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store one token of every sequence and attend: output (n_sequences, 1, n_q_heads, d).

        query, key, value: (n_sequences, heads, 1, d), the clock advanced to their token.
        """
        frame, described, clock = self.reader.frame, self.reader.described, self.clock
        scale, softcap = described.softmax_scale, described.logit_softcap
        asked = frame.enter(
            query[:, :, 0],
            key[:, :, 0].to(query.dtype),
            value[:, :, 0].to(query.dtype),
            tail=self.tail,
            rows=clock.rows,
            turns=clock.turns,
            # Without a soft-cap what every logit of a head gets changes no weight.
            with_offset=softcap > 0.0,
        )
        where = clock.query_positions if described.window else None
        plan = self.reserve.plan
        if plan is not None:
            found = ada_decode(
                asked.query,
                plan.cache,
                scale,
                logit_offset=asked.offset,
                logit_softcap=softcap,
                window=described.window,
                query_positions=where,
                position_term=asked.term,
                plan=plan,
            )
        else:
            found = ada_decode_reference(
                asked.query,
                self.reserve.pages,
                scale,
                logit_offset=asked.offset,
                logit_softcap=softcap,
                window=described.window,
                query_positions=where,
                position_term=asked.term,
            )
        return frame.leave(found.output, query.dtype)[:, None]

    def encoded(self, index: slice | Tensor, n_pages: int) -> tuple[Tensor, Tensor]:
        """The oldest tokens of some tails as pages: (n_chosen, n_kv_heads, n_pages, page bytes).

        index: of the sequences.  Second: a flag on the device, not 0 where their code cannot hold
        some vector.

        Raises:
            SphkvError: there are some, and torch operations encode.
        """
        rule = self.store.rule
        n, d = n_pages * rule.page_size, self.tail.shape[4]
        # Without a copy where all are chosen: sequences and heads lie one capacity apart each.
        rows = self.tail[:, index].flatten(1, 2)
        keys, values = rows[:, :, :n].view(2, rows.shape[1], n_pages, rule.page_size, d)
        try:
            tier = rule.tiers[rule.later_tier]
            pages, refused = encode_flagged(tier, keys, values, uses_kernel=self.store.uses_kernel)
        except PageError:
            raise  # of the layout, not of a vector
        except ValueError as error:
            raise uncodable(self.store.layer, str(error)) from error
        return pages.view(-1, self.tail.shape[2], n_pages, pages.shape[-1]), refused

    def state(
        self, n_tail: tuple[int, ...], n_sealed: tuple[int, ...], next_position: tuple[int, ...]
    ) -> StoreState:
        """The layer as it was before it was entered, its tail turned back."""
        frames, pages = self.store.rule.frames, _without_tail(self.reserve.pages)
        keys, values = torch.empty_like(self.tail[0]), torch.empty_like(self.tail[1])
        for s, (n, following) in enumerate(zip(n_tail, next_position, strict=True)):
            positions = torch.arange(following - n, following, device=self.tail.device)
            rows = self.tail[:, s, :, :n].transpose(1, 2).float()
            keys[s, :, :n] = frames.keys_from_frame(self.store.layer, rows[0], positions).transpose(
                0, 1
            )
            values[s, :, :n] = frames.output_from_frame(rows[1]).transpose(0, 1)
        live = kept(pages, pages.page_table.live_tokens > 0)
        whole = live if live.page_table.n_entries else None
        made = PagePlan.of(whole, self.store.group_size if self.store.uses_kernel else None)
        return StoreState(whole, made, keys, values, n_tail, n_sealed, next_position)

    def n_bytes(self, shared: set[int]) -> int:
        """Bytes of every tensor but those in `shared` (storage addresses), which is extended."""
        pages, plan = self.reserve.pages, self.reserve.plan
        tensors = [self.reserve.entries]
        if self.reserve.records is not None:
            tensors.append(self.reserve.records)
        if plan is not None:
            tensors += [*plan.tensors, plan.cache.page_table.live_tokens]
        tensors += [self.tail, pages.pool]
        table = pages.page_table
        tensors += [table.offsets, table.tiers, table.live_tokens, table.starts]
        if pages.positions is not None:
            tensors.append(pages.positions)
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in shared:
                shared.add(storage.data_ptr())
                total += storage.nbytes()
        return total


def _without_tail(pages: PagedCache) -> PagedCache:
    return replace(pages, tail_keys=None, tail_values=None, tail_tokens=None, tail_positions=None)


def _no_pages(
    store: LayerStore, n_sequences: int, n_kv_heads: int, d: int, device: torch.device
) -> PagedCache:
    rule, n_rows = store.rule, n_sequences * n_kv_heads
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    table = PageTable(
        nothing,
        nothing.to(torch.int8),
        nothing.to(torch.int16),
        torch.zeros(n_rows + 1, dtype=torch.int32, device=device),
    )
    positions = None
    if store.stores_positions:
        size = (0, rule.page_size)
        positions = torch.zeros(size, dtype=store.position_dtype, device=device)
    return PagedCache(
        tiers=tuple(rule.tiers),
        page_size=rule.page_size,
        n_sequences=n_sequences,
        n_kv_heads=n_kv_heads,
        head_dim=d,
        pool=nothing.to(torch.uint8),
        page_table=table,
        positions=positions,
    )
