"""Where the tokens of a plan's pages are, as a position term reads them (`cuda/position.cuh`).

    position of a live token = first of its page + its offset

Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_kernels.cache import PagedCache

NEAR = 4095
"""Offsets up to here turn into phases by half of the frequency's bits: 2^-21 turns of error."""


@dataclass(frozen=True)
class PagePositions:
    """first: ``(n) int32``, the lowest position of every page's live tokens.  offsets: ``(n,
    page_size)``, how far each token lies after it, in the order of norms (LAYOUT.md): uint16, or
    int32 where a page spans more than 65535; None where the tokens of every page follow one
    another.  near: no offset of a live token exceeds `NEAR`.
    """

    first: Tensor
    offsets: Tensor | None
    near: bool

    @staticmethod
    def of(cache: PagedCache, entries: Tensor) -> PagePositions | None:
        """Those of the pages named by `entries`, ``(n) int32``; None without positions.

        A page without a live token counts as one whose first is the lowest: a slot that comes to
        life keeps its offsets.
        """
        if cache.positions is None:
            return None
        stored = cache.positions
        if stored.dtype == torch.uint16:  # CUDA itself does not index it
            stored = stored.view(torch.int16)
        rows = stored[entries].to(torch.int32)
        if stored.dtype == torch.int16:
            rows = rows & 0xFFFF
        slots = torch.arange(cache.page_size, device=cache.device)
        dead = slots >= cache.page_table.live_tokens[entries].clamp(min=1)[:, None]
        first = rows.masked_fill(dead, torch.iinfo(torch.int32).max).amin(dim=1)
        offsets = rows - first[:, None]
        if bool(((offsets == slots) | dead).all()):
            return PagePositions(first, None, near=True)
        furthest = int(offsets.masked_fill(dead, 0).max())
        of_units = offsets.view(-1, cache.page_size // 16, 2, 8).transpose(2, 3)
        offsets = of_units.reshape(offsets.shape).contiguous()
        if furthest <= 0xFFFF:
            offsets = offsets.to(torch.int16).view(torch.uint16)
        return PagePositions(first, offsets, near=furthest <= NEAR)

    @property
    def offset_bytes(self) -> int:
        """Of one stored offset; 0 where none is."""
        return 0 if self.offsets is None else self.offsets.element_size()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What there is: all that a position term reads."""
        return (self.first,) if self.offsets is None else (self.first, self.offsets)

    @property
    def n_bytes(self) -> int:
        """Their bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)
