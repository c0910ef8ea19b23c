"""The page table: which pages hold the tokens of each (sequence, KV head).

Entries of sequence s and KV head h: ``starts[i] : starts[i + 1]``, ``i = s * n_kv_heads + h``.
Source: ours; paging after vLLM (arXiv 2309.06180).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PageTable:
    """Page-table entries, grouped by (sequence, KV head).

    offsets: ``(n_entries) int64``, first byte of the page in the pool, a multiple of 16.
    tiers: ``(n_entries) int8``, index into the cache's tiers.
    live_tokens: ``(n_entries) int16``, rows in use; 0 marks a dead slot whose other fields (a huge
    offset, any tier) must not be read.
    starts: ``(n_sequences * n_kv_heads + 1) int32``, first entry of every (sequence, KV head).
    """

    offsets: Tensor
    tiers: Tensor
    live_tokens: Tensor
    starts: Tensor

    @property
    def n_entries(self) -> int:
        return self.offsets.shape[0]

    @property
    def n_bytes(self) -> int:
        """Bytes of the table itself."""
        tensors = (self.offsets, self.tiers, self.live_tokens, self.starts)
        return sum(t.numel() * t.element_size() for t in tensors)

    def equals(self, other: "PageTable") -> bool:
        """Whether both name the same pages; waits for the device unless they are one object."""
        mine, its = (
            (table.offsets, table.tiers, table.live_tokens, table.starts) for table in (self, other)
        )
        return self is other or all(map(torch.equal, mine, its))

    def head_of_entry(self) -> Tensor:
        """``(n_entries) int64``: index ``sequence * n_kv_heads + kv_head`` of every entry."""
        counts = (self.starts[1:] - self.starts[:-1]).to(torch.int64)
        heads = torch.arange(counts.shape[0], device=counts.device)
        return torch.repeat_interleave(heads, counts)

    def to(self, device: torch.device | str) -> "PageTable":
        """The same table on another device."""
        return PageTable(
            self.offsets.to(device),
            self.tiers.to(device),
            self.live_tokens.to(device),
            self.starts.to(device),
        )

    def entries_of(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """The entries of the named (sequence, KV head) indices, one after the other.

        heads: ``(n) int64``, each ``sequence * n_kv_heads + kv_head``, repeats allowed.  Returns
        ``(entries int64, starts (n + 1) int32)``.
        """
        first = self.starts[heads].to(torch.int64)
        counts = self.starts[heads + 1].to(torch.int64) - first
        starts = torch.zeros(heads.shape[0] + 1, dtype=torch.int64, device=heads.device)
        starts[1:] = counts.cumsum(0)
        within = torch.arange(int(starts[-1]), device=heads.device)
        entries = within + torch.repeat_interleave(first - starts[:-1], counts)
        return entries, starts.to(torch.int32)

    def select(self, heads: Tensor) -> tuple["PageTable", Tensor]:
        """The table of the named (sequence, KV head) indices, and the entries it took."""
        entries, starts = self.entries_of(heads)
        table = PageTable(
            self.offsets[entries], self.tiers[entries], self.live_tokens[entries], starts
        )
        return table, entries
