"""One layer's queries over its pages of codes and its dense tail, joined in one softmax.

A decode step asks every sequence once; a longer portion of new tokens (the next turn of a
conversation) asks the same pages with many queries, as so many sequences that share them.
Source: ours; attention in the codes after Spherical KV (arXiv 2605.18856).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_cli.generation.dense_part import dense_part
from sphkv_cli.generation.layer_frame import LayerFrame
from sphkv_cli.generation.store_state import NewTokens, StoreState
from sphkv_cli.models.geometry import AttentionLayer
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.decode import AttentionPlan, ada_decode
from sphkv_kernels.reference import DecodeResult, ada_decode_reference, merge_partial

_QUERIES_AT_ONCE = 32


@dataclass(frozen=True, eq=False)
class LayerReader:
    """Attends for one layer; `uses_kernel`: by the CUDA kernel, else by the float64 reference."""

    described: AttentionLayer
    frame: LayerFrame
    uses_kernel: bool

    def attend(self, state: StoreState, query: Tensor, tokens: NewTokens) -> Tensor:
        """Output (n_sequences, n_q_heads, n_columns, d) in the queries' dtype.

        Args:
            state: with the new tokens already in its tail.
            query: (n_sequences, n_q_heads, n_columns, d), post-RoPE; columns that are no tokens
                get what nobody reads.
        """
        asked = query.to(torch.float32 if self.uses_kernel else torch.float64)
        # A plain step needs neither positions nor a mask, which cost a copy to the device each.
        is_plain = tokens.is_one_each and not self.described.window
        positions = None if is_plain else _query_positions(tokens, query.device)
        sees_all = is_plain and len(set(state.n_tail)) == 1
        dense = dense_part(
            asked,
            state.tail_keys[:, :, : max(state.n_tail)],
            state.tail_values[:, :, : max(state.n_tail)],
            None if sees_all else self._visible(state, positions),
            scale=self.described.softmax_scale,
            softcap=self.described.logit_softcap,
        )
        if state.pages is None or not state.pages.page_table.n_entries:
            return dense.output.to(query.dtype)
        if tokens.n_columns == 1:
            now = None if positions is None else positions[:, 0]
            made = None if state.plan is None else state.plan.made
            coded = self._pages(state.pages, made, asked[:, :, 0], now)
            coded = DecodeResult(coded.output[:, :, None], coded.log_sum_exp[:, :, None])
        else:
            assert positions is not None
            coded = self._many(state.pages, asked, positions)
        return merge_partial([coded, dense]).output.to(query.dtype)

    def _visible(self, state: StoreState, positions: Tensor | None) -> Tensor:
        """(n_sequences, n_columns, n_rows): tail rows that a query sees, by their positions.

        positions: None where every query is the last token of its sequence.
        """
        device = state.tail_keys.device
        rows = torch.arange(max(state.n_tail), device=device)
        of_row = state.tail_positions[:, None] + rows
        live = rows < torch.tensor(state.n_tail, device=device)[:, None]
        if positions is None:
            return live[:, None, :]
        distance = positions[:, :, None] - of_row[:, None, :]
        seen = (distance >= 0) & live[:, None, :]
        return seen & (distance < self.described.window) if self.described.window else seen

    def _many(self, pages: PagedCache, asked: Tensor, positions: Tensor) -> DecodeResult:
        outputs, sums = torch.empty_like(asked), torch.empty_like(asked[..., 0])
        for s in range(asked.shape[0]):
            for start in range(0, asked.shape[2], _QUERIES_AT_ONCE):
                block = slice(start, start + _QUERIES_AT_ONCE)
                queries = asked[s, :, block].transpose(0, 1)
                shared = pages.select_sequences([s] * queries.shape[0])
                found = self._pages(shared, None, queries, positions[s, block])
                outputs[s, :, block] = found.output.transpose(0, 1)
                sums[s, :, block] = found.log_sum_exp.transpose(0, 1)
        return DecodeResult(outputs, sums)

    def _pages(
        self,
        pages: PagedCache,
        plan: AttentionPlan | None,
        queries: Tensor,
        positions: Tensor | None,
    ) -> DecodeResult:
        """queries (n_sequences, n_q_heads, d); the output is out of the frame.

        positions: (n_sequences) of the queries, needed in a sliding window.
        """
        framed = self.frame.queries(queries)
        scale, softcap = self.described.softmax_scale, self.described.logit_softcap
        window = self.described.window
        where = None
        if window and positions is not None:
            where = positions.to(torch.int32).contiguous()
        if self.uses_kernel:
            found = ada_decode(
                framed.query,
                pages,
                scale,
                logit_offset=framed.offset,
                logit_softcap=softcap,
                window=window,
                query_positions=where,
                position_term=framed.term,
                plan=plan,
            )
        else:
            found = ada_decode_reference(
                framed.query,
                pages,
                scale,
                logit_offset=framed.offset,
                logit_softcap=softcap,
                window=window,
                query_positions=where,
                position_term=framed.term,
            )
        return DecodeResult(self.frame.outputs(found.output), found.log_sum_exp)


def _query_positions(tokens: NewTokens, device: torch.device) -> Tensor:
    """(n_sequences, n_columns) int64; a column that is no token has the position of the next."""
    rows = []
    for columns, first in zip(tokens.stored, tokens.first_position, strict=True):
        row = torch.full((tokens.n_columns,), first, dtype=torch.int64)
        for index, column in enumerate(columns):
            row[column] = first + index
        rows.append(row)
    return torch.stack(rows).to(device)
