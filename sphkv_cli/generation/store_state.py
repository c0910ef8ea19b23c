"""What a layer holds at one moment, and the tokens of one forward pass: values, never changed."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sphkv_cli.generation.page_store import tensor_bytes
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.decode import AttentionPlan, plan


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
class PagePlan:
    """How the kernel reads pages, planned at the first read (`made`): some are never read so."""

    pages: PagedCache
    group_size: int

    @staticmethod
    def of(pages: PagedCache | None, group_size: int | None) -> "PagePlan | None":
        """None without pages, or without a kernel that reads (group_size None)."""
        if group_size is None or pages is None or not pages.page_table.n_entries:
            return None
        return PagePlan(pages, group_size)

    @cached_property
    def made(self) -> AttentionPlan:
        """The plan."""
        return plan(self.pages, self.group_size, check=False)

    @property
    def n_bytes(self) -> int:
        """Bytes of its tensors, if there are any yet."""
        if "made" not in self.__dict__:
            return 0
        return sum(t.untyped_storage().nbytes() for t in self.made.tensors)


@dataclass(frozen=True, eq=False)
class StoreState:
    """tail_keys, tail_values: (n_sequences, n_kv_heads, capacity, d) as the model made them.

    n_tail, n_sealed: tokens of each sequence in the tail and on pages (dropped ones count);
    next_position: of each sequence's next token.
    """

    pages: PagedCache | None
    plan: PagePlan | None
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
        return tail + pages + (0 if self.plan is None else self.plan.n_bytes)
