"""The paged, tier-mixed cache of one layer: a pool of bytes and a page table.

``page(entry) = pool[offsets[entry] : offsets[entry] + page_bytes(tiers[entry])]``; the entries of
sequence s and KV head h are ``starts[s * n_kv_heads + h] : starts[s * n_kv_heads + h + 1]``.
A page holds up to ``page_size`` tokens of ONE KV head in ONE tier.  Attention does not depend on
the order of tokens, so a page may hold any tokens; where position matters (a sliding window,
centring before RoPE) their positions are stored.  Source: ours; paging after vLLM
(arXiv 2309.06180).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sphkv_kernels.launch_arguments import require, require_aligned
from sphkv_kernels.page_table import PageTable
from sphkv_kernels.pages import PAGE_SIZES, page_bytes
from sphkv_kernels.tier import PageError, TierFormat

POSITION_DTYPES = (torch.int32, torch.uint16)


@dataclass(frozen=True)
class PagedCache:
    """The coded keys and values of one layer, for any number of sequences.

    pool: ``(n_bytes) uint8``.  positions: ``(n_entries, page_size)`` int32, or uint16 where every
    position is below 65536 (dead rows hold all bits set), or None.
    tail_keys, tail_values: the write-hot tail, ``(n_sequences, n_kv_heads, tail_size, head_dim)
    bfloat16`` in the frame, with ``tail_tokens (n_sequences) int32`` rows in use (dead rows may
    hold anything), or None.  ``tail_positions (n_sequences) int32``: position of the first tail
    token (the rest follow it), needed only where positions matter.  Raises PageError on shapes,
    dtypes or devices that do not fit; `check` looks at what the tensors hold.
    """

    tiers: tuple[TierFormat, ...]
    page_size: int
    n_sequences: int
    n_kv_heads: int
    head_dim: int
    pool: Tensor
    page_table: PageTable
    positions: Tensor | None = None
    tail_keys: Tensor | None = None
    tail_values: Tensor | None = None
    tail_tokens: Tensor | None = None
    tail_positions: Tensor | None = None

    def __post_init__(self) -> None:
        table = self.page_table
        n = table.n_entries
        if self.page_size not in PAGE_SIZES:
            raise PageError(f"page_size {self.page_size}: choose one of {PAGE_SIZES}")
        expected: dict[str, tuple[Tensor, tuple[int, ...], torch.dtype]] = {
            "pool": (self.pool, (self.pool.numel(),), torch.uint8),
            "page_table.offsets": (table.offsets, (n,), torch.int64),
            "page_table.tiers": (table.tiers, (n,), torch.int8),
            "page_table.live_tokens": (table.live_tokens, (n,), torch.int16),
            "page_table.starts": (
                table.starts,
                (self.n_sequences * self.n_kv_heads + 1,),
                torch.int32,
            ),
        }
        if self.positions is not None:
            dtype = self.positions.dtype
            allowed = dtype if dtype in POSITION_DTYPES else torch.int32
            expected["positions"] = (self.positions, (n, self.page_size), allowed)
        tail = (self.tail_keys, self.tail_values, self.tail_tokens)
        if any(t is None for t in tail) and any(t is not None for t in tail):
            raise PageError("tail_keys, tail_values and tail_tokens come together or not at all")
        if self.tail_keys is not None:
            assert self.tail_values is not None and self.tail_tokens is not None
            size = self.tail_keys.shape[2] if self.tail_keys.ndim == 4 else 0
            tail_shape = (self.n_sequences, self.n_kv_heads, size, self.head_dim)
            expected["tail_keys"] = (self.tail_keys, tail_shape, torch.bfloat16)
            expected["tail_values"] = (self.tail_values, tail_shape, torch.bfloat16)
            expected["tail_tokens"] = (self.tail_tokens, (self.n_sequences,), torch.int32)
        if self.tail_positions is not None:
            expected["tail_positions"] = (self.tail_positions, (self.n_sequences,), torch.int32)
        for name, (tensor, shape, dtype) in expected.items():
            if tensor.device != self.pool.device:
                raise PageError(
                    f"cache.{name} lies on {tensor.device}, the pool on {self.pool.device}; "
                    "move the whole cache with .to(device)"
                )
            require(f"cache.{name}", tensor, shape, dtype, self.device)

    @property
    def device(self) -> torch.device:
        return self.pool.device

    def tier_page_bytes(self) -> tuple[int, ...]:
        """Bytes of one page of every tier."""
        return tuple(page_bytes(tier, self.head_dim, self.page_size) for tier in self.tiers)

    def require_aligned(self) -> None:
        """Refuse what 16-byte loads cannot read (PageError): asked where addresses are taken."""
        for name in ("pool", "tail_keys", "tail_values"):
            tensor = getattr(self, name)
            if tensor is not None:
                require_aligned(f"cache.{name}", tensor)

    def check(self) -> None:
        """Read the whole table back; raise PageError on the first entry that cannot be right.

        Live entries lie inside the pool on a 16-byte boundary, name an existing tier and at most
        page_size tokens; the starts rise from 0 to the number of entries; positions of live tokens
        and of tails are not negative.
        """
        table = self.page_table
        starts = table.starts.tolist()
        if starts[0] != 0 or starts[-1] != table.n_entries or sorted(starts) != starts:
            raise PageError("page_table.starts must rise from 0 to the number of entries")
        sizes = self.tier_page_bytes()
        rows = zip(
            table.offsets.tolist(), table.tiers.tolist(), table.live_tokens.tolist(), strict=True
        )
        for entry, (offset, tier, live) in enumerate(rows):
            if live == 0:
                continue
            if not 0 < live <= self.page_size:
                raise PageError(f"entry {entry}: {live} live tokens on a page of {self.page_size}")
            if not 0 <= tier < len(self.tiers):
                raise PageError(f"entry {entry}: tier {tier} of {len(self.tiers)}")
            if offset < 0 or offset % 16 or offset + sizes[tier] > self.pool.numel():
                raise PageError(
                    f"entry {entry}: page at byte {offset} of {sizes[tier]} bytes does not lie on "
                    f"a 16-byte boundary inside the pool of {self.pool.numel()} bytes"
                )
        if self.tail_tokens is not None and self.tail_keys is not None:
            size = self.tail_keys.shape[2]
            if self.tail_tokens.numel() and not (
                int(self.tail_tokens.min()) >= 0 and int(self.tail_tokens.max()) <= size
            ):
                raise PageError(f"tail_tokens must lie in 0..{size}")
        if self.positions is not None and self.positions.dtype != torch.uint16:
            slots = torch.arange(self.page_size, device=self.device)
            live = slots < self.page_table.live_tokens[:, None]
            self._check_positions("positions of live tokens", self.positions[live])
        if self.tail_positions is not None:
            self._check_positions("tail_positions", self.tail_positions)

    @staticmethod
    def _check_positions(name: str, positions: Tensor) -> None:
        if positions.numel() and int(positions.min()) < 0:
            raise PageError(f"{name} must be 0 or more, one is {int(positions.min())}")

    def to(self, device: torch.device | str) -> "PagedCache":
        """The same cache on another device."""

        def moved(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        return replace(
            self,
            pool=self.pool.to(device),
            page_table=self.page_table.to(device),
            positions=moved(self.positions),
            tail_keys=moved(self.tail_keys),
            tail_values=moved(self.tail_values),
            tail_tokens=moved(self.tail_tokens),
            tail_positions=moved(self.tail_positions),
        )

    def select_sequences(self, sequences: list[int]) -> "PagedCache":
        """A cache whose sequence i is sequence ``sequences[i]`` of this one.

        Pages are shared, not copied; a sequence may be named many times (many queries against one
        context) or not at all.
        """
        for s in sequences:
            if not 0 <= s < self.n_sequences:
                raise PageError(f"sequence {s}: the cache holds {self.n_sequences}")
        chosen = torch.tensor(sequences, dtype=torch.int64, device=self.device)
        kv_heads = torch.arange(self.n_kv_heads, device=self.device)
        heads = (chosen[:, None] * self.n_kv_heads + kv_heads).reshape(-1)
        table, entries = self.page_table.select(heads)

        return replace(
            self,
            n_sequences=len(sequences),
            page_table=table,
            positions=chosen_rows(self.positions, entries),
            tail_keys=chosen_rows(self.tail_keys, chosen),
            tail_values=chosen_rows(self.tail_values, chosen),
            tail_tokens=chosen_rows(self.tail_tokens, chosen),
            tail_positions=chosen_rows(self.tail_positions, chosen),
        )


def chosen_rows(rows: Tensor | None, which: Tensor) -> Tensor | None:
    """``rows[which]`` for a mask or indices, None for None; CUDA itself does not index uint16."""
    if rows is None or rows.dtype != torch.uint16:
        return None if rows is None else rows[which]
    return rows.view(torch.int16)[which].view(torch.uint16)
