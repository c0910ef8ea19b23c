"""Real pages at longer contexts and larger batches than were captured.

Every (sequence, KV head) of the result holds the pages of one captured sequence ``n_repeats`` times
over, each time copied to an address of its own: the bytes stream from memory like those of a long
context, in the same mix of tiers.  Repeating every token r times leaves the attention output as it
is and adds ln r to the log-sum-exp.  Source: ours.
"""

from dataclasses import replace

import torch

from sphkv_kernels.cache import PagedCache
from sphkv_kernels.page_table import PageTable
from sphkv_kernels.tier import PageError


def tile_pages(
    cache: PagedCache, n_sequences: int, n_repeats: int, *, span: int | None = None
) -> PagedCache:
    """A cache of ``n_sequences`` copies of a one-sequence cache, each ``n_repeats`` times as long.

    span: tokens by which the positions of every further repeat are moved; None leaves positions
    out.  Raises PageError where the cache has another number of sequences or a tail, or no
    positions that could be moved, or where they outgrow their dtype.
    """
    if cache.n_sequences != 1 or cache.tail_keys is not None:
        raise PageError("tiling needs a cache of one sequence without a tail")
    if n_sequences < 1 or n_repeats < 1:
        raise PageError(f"{n_sequences} sequences of {n_repeats} repeats: give 1 or more of each")
    table, n_kv_heads = cache.page_table, cache.n_kv_heads
    n_copies = n_sequences * n_repeats
    # Row (sequence, KV head, repeat): the entries of its KV head, in a copy of the pool of its own.
    heads = torch.arange(n_kv_heads, device=cache.device).repeat_interleave(n_repeats)
    rows, entries = table.select(heads.repeat(n_sequences))
    repeat = torch.arange(n_repeats, device=cache.device).repeat(n_kv_heads)
    sequence = torch.arange(n_sequences, device=cache.device)[:, None]
    copy = (sequence * n_repeats + repeat).reshape(-1)
    starts = rows.starts.to(torch.int64)
    copy_of_entry = torch.repeat_interleave(copy, starts[1:] - starts[:-1])
    positions = None
    if span is not None:
        positions = _moved_positions(cache, entries, copy_of_entry % n_repeats * span)
    return replace(
        cache,
        n_sequences=n_sequences,
        pool=cache.pool.repeat(n_copies),
        page_table=PageTable(
            offsets=rows.offsets + copy_of_entry * cache.pool.numel(),
            tiers=rows.tiers,
            live_tokens=rows.live_tokens,
            starts=rows.starts[::n_repeats].contiguous(),
        ),
        positions=positions,
    )


def _moved_positions(cache: PagedCache, entries: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """The positions of entries ``(n)``, each moved `by` tokens; dead rows keep all bits set."""
    if cache.positions is None:
        raise PageError("tiling with positions needs a cache built with positions")
    dtype = cache.positions.dtype
    # CUDA does not index uint16.
    positions = cache.positions.to(torch.int64)[entries]
    row = torch.arange(cache.page_size, device=cache.device)
    is_live = row < cache.page_table.live_tokens[entries][:, None]
    moved = positions + by[:, None]
    limit = 1 << (16 if dtype == torch.uint16 else 31)
    if bool((moved[is_live] >= limit).any()):
        raise PageError(f"tiled positions reach {limit}, which {dtype} does not hold")
    return torch.where(is_live, moved, positions).to(dtype)
