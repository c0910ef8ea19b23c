"""Where the next token of every sequence goes, counted on the device.

A captured step is replayed with the same arguments: what changes from token to token lies in
these tensors, which the step itself advances.  Source: ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sphkv_cli.generation.layer_frame import Turns


class StepClock:
    """Counters of n sequences, shared by all layers.

    After `advance`, during a step: tail_tokens (n) int32 counts the new token, query_positions (n)
    int32 is its position and rows (2 n n_kv_heads) int64 its rows in a tail of keys, then values,
    (2, n, n_kv_heads, capacity, d); turns are those of the new tokens.  Between steps: position_ids
    (n, 1) int64 of the next token.
    tail_positions (n) int32: of each tail's first token.
    """

    def __init__(self, n_sequences: int, n_kv_heads: int, capacity: int, device: torch.device):
        n_rows = 2 * n_sequences * n_kv_heads
        self._n_kv_heads, self._capacity = n_kv_heads, capacity
        self._narrow = torch.zeros((2, n_sequences), dtype=torch.int32, device=device)
        self._wide = torch.zeros(n_rows + n_sequences, dtype=torch.int64, device=device)
        self.tail_positions = torch.zeros(n_sequences, dtype=torch.int32, device=device)
        self.tail_tokens, self.query_positions = self._narrow[0], self._narrow[1]
        self.rows = self._wide[:n_rows]
        self.position_ids: Tensor = self._wide[n_rows:, None]
        self.turns = Turns(self.query_positions)

    def set(self, n_tail: Sequence[int], next_position: Sequence[int]) -> None:
        """Between steps: tokens in each tail, and each sequence's next position."""
        tail, following = torch.tensor(n_tail), torch.tensor(next_position)
        self._narrow.copy_(torch.stack([tail, following - 1]))
        self.tail_positions.copy_(following - tail)
        heads = tail[None, :, None].expand(2, -1, self._n_kv_heads).reshape(-1)
        first = torch.arange(heads.numel()) * self._capacity
        self._wide.copy_(torch.cat([first + heads - 1, following]))
        self.forget_turns()

    def advance(self) -> None:
        """The step begins: every sequence has one token more."""
        self._narrow.add_(1)
        self._wide.add_(1)
        self.forget_turns()

    def forget_turns(self) -> None:
        """The next token has other ones; and what a captured step made is the graph's."""
        self.turns = Turns(self.query_positions)

    @property
    def n_bytes(self) -> int:
        """Bytes of the counters."""
        tensors = (self._narrow, self._wide, self.tail_positions)
        return sum(t.untyped_storage().nbytes() for t in tensors)
