"""What a layer holds at one moment, and the tokens of one forward pass: values, never changed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_cli.generation.page_store import tensor_bytes
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.decode import AttentionPlan


@dataclass(frozen=True)
class NewTokens:
    """The tokens of one forward pass.

    stored: per sequence the columns that are tokens (padding is not); first_position: of each
    sequence's first stored token, the others follow it.
    """

    n_columns: int
    stored: tuple[tuple[int, ...], ...]
    first_position: tuple[int, ...]

    @property
    def is_one_each(self) -> bool:
        """One column, a token of every sequence: a decode step."""
        return self.n_columns == 1 and all(len(columns) == 1 for columns in self.stored)


@dataclass(frozen=True, eq=False)
class StoreState:
    """tail_keys, tail_values: (n_sequences, n_kv_heads, capacity, d) as the model made them.

    n_tail, n_sealed: tokens of each sequence in the tail and on pages (dropped ones count);
    next_position: of each sequence's next token.
    """

    pages: PagedCache | None
    plan: AttentionPlan | None
    tail_keys: Tensor
    tail_values: Tensor
    n_tail: tuple[int, ...]
    n_sealed: tuple[int, ...]
    next_position: tuple[int, ...]

    @property
    def n_sequences(self) -> int:
        """Sequences of the batch."""
        return len(self.n_tail)

    @property
    def tail_positions(self) -> Tensor:
        """(n_sequences) int64 position of the first row of each tail."""
        first = [p - n for p, n in zip(self.next_position, self.n_tail, strict=True)]
        return torch.tensor(first, device=self.tail_keys.device)

    @property
    def n_bytes(self) -> int:
        """Bytes of every tensor held."""
        tail = (
            self.tail_keys.untyped_storage().nbytes() + self.tail_values.untyped_storage().nbytes()
        )
        pages = 0 if self.pages is None else tensor_bytes(self.pages)
        work = 0
        if self.plan is not None:
            scratch = (self.plan.partial_output, self.plan.partial_state, self.plan.arrivals)
            work = self.plan.work.n_bytes + sum(t.untyped_storage().nbytes() for t in scratch)
        return tail + pages + work
