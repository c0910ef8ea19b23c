"""Logits and value sums straight from page bytes, tier by tier, in float64.

Spherical keys (ADA): with the cosines and sines of the stored angles,

    t^0 = q,   t^l_j = c^l_j t^{l-1}_{2j-1} + s^l_j t^{l-1}_{2j},   logit = sum_j r_j t^L_j;

int8 keys: ``scale * (code . q)``; dense keys: a dot product.  Every page of a tier is read once,
however many sequences share it.  Sources as in `sphkv_kernels.reference`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_codebooks.encoded import EncodedVectors
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.layout import Operand
from sphkv_kernels.pages import key_region_bytes, unpack_region
from sphkv_kernels.tier import RegionFormat
from sphkv_kernels.vectors import StoredVectors, decode_vectors, zeroed_rows

_CHUNK_ELEMENTS = 1 << 18
"""float64 elements of the largest intermediate: 2 MiB, so that it stays in a core's cache."""


@dataclass(frozen=True)
class TierPages:
    """The live pages of one tier: unique stored vectors and which of them each entry reads."""

    region_format: RegionFormat
    entries: Tensor
    page_of_entry: Tensor
    stored: StoredVectors

    def decode(self) -> Tensor:
        """``(n_pages, page_size, head_dim) float64``."""
        return decode_vectors(self.region_format, self.stored)


def page_logits(grouped_query: Tensor, cache: PagedCache) -> Tensor:
    """``(n_entries, group_size, page_size) float64``, 0 in rows that are not live.

    grouped_query: ``(n_sequences, n_kv_heads, group_size, head_dim) float64``.
    """
    group_size = grouped_query.shape[2]
    query_of_head = grouped_query.reshape(-1, group_size, cache.head_dim)
    head = cache.page_table.head_of_entry()
    shape = (cache.page_table.n_entries, group_size, cache.page_size)
    logits = torch.zeros(shape, dtype=torch.float64, device=cache.device)
    chunk = max(1, _CHUNK_ELEMENTS // (group_size * cache.page_size * cache.head_dim))
    for tier in tier_pages(cache, "key"):
        keys = _KeyOperand.of(tier)
        for first in range(0, tier.entries.shape[0], chunk):
            entries = tier.entries[first : first + chunk]
            pages = tier.page_of_entry[first : first + chunk]
            logits[entries] = keys.dot(query_of_head[head[entries]], pages)
    return logits


def page_values(weights: Tensor, cache: PagedCache, n_heads: int) -> Tensor:
    """``sum_t weight_t vhat_t`` per head: ``(n_heads, group_size, head_dim) float64``.

    weights: ``(n_entries, group_size, page_size)``, zero in rows that are not live.
    """
    head = cache.page_table.head_of_entry()
    group_size = weights.shape[1]
    shape = (n_heads, group_size, cache.head_dim)
    sums = torch.zeros(shape, dtype=torch.float64, device=cache.device)
    chunk = max(1, _CHUNK_ELEMENTS // (cache.page_size * cache.head_dim))
    for tier in tier_pages(cache, "value"):
        values = decode_vectors(tier.region_format, tier.stored)
        for first in range(0, tier.entries.shape[0], chunk):
            entries = tier.entries[first : first + chunk]
            pages = tier.page_of_entry[first : first + chunk]
            sums.index_add_(0, head[entries], weights[entries] @ values[pages])
    return sums


class _KeyOperand:
    """Keys of one tier ready to meet queries: cosines and sines per level, and radii.

    All are ``(n_pages, angles or radii, page_size)``: with the tokens last, every step of the
    recursion runs over contiguous memory.
    """

    def __init__(self, cosines: list[Tensor], sines: list[Tensor], radii: Tensor, rope: bool):
        self._cosines = [t.transpose(1, 2).contiguous() for t in cosines]
        self._sines = [t.transpose(1, 2).contiguous() for t in sines]
        self._radii = radii.transpose(1, 2).contiguous()
        self._rope = rope

    @staticmethod
    def of(tier: TierPages) -> "_KeyOperand":
        stored = tier.stored
        if isinstance(tier.region_format, SphericalCode):
            assert isinstance(stored, EncodedVectors)
            code = tier.region_format
            cosines, sines = [], []
            for book, codes in zip(code.codebooks, stored.angle_codes, strict=True):
                cosine, sine = book.cos_sin()
                index = codes.to(torch.int64)
                cosines.append(torch.tensor(cosine.copy(), device=codes.device)[index])
                sines.append(torch.tensor(sine.copy(), device=codes.device)[index])
            radii = code.decode_radii(stored, torch.float64)
            return _KeyOperand(cosines, sines, radii, code.pairing == "rope")
        # Depth 0 of the same recursion: the "radii" are the coordinates themselves.
        return _KeyOperand([], [], decode_vectors(tier.region_format, stored), False)

    def dot(self, query: Tensor, pages: Tensor) -> Tensor:
        """query ``(n, group_size, head_dim)``, pages ``(n)`` -> ``(n, group_size, page_size)``."""
        if not self._cosines:
            return query @ self._radii[pages]
        t = query[..., None]
        for level, (cosines, sines) in enumerate(zip(self._cosines, self._sines, strict=True)):
            if level == 0 and self._rope:
                first, second = t.chunk(2, dim=2)
            else:
                first, second = t[:, :, 0::2], t[:, :, 1::2]
            t = (cosines[pages][:, None] * first).addcmul_(sines[pages][:, None], second)
        return (t * self._radii[pages][:, None]).sum(2)


def tier_pages(cache: PagedCache, operand: Operand) -> Iterator[TierPages]:
    """The live pages of the K or the V regions, tier by tier; dead rows are zero."""
    table = cache.page_table
    page_sizes = cache.tier_page_bytes()
    for index, tier in enumerate(cache.tiers):
        live = (table.tiers == index) & (table.live_tokens > 0)
        entries = torch.nonzero(live).flatten()
        if entries.numel() == 0:
            continue
        offsets, page_of_entry = torch.unique(table.offsets[entries], return_inverse=True)
        key_bytes = key_region_bytes(tier, cache.head_dim, cache.page_size)
        region_format = tier.key_format if operand == "key" else tier.value_format
        span = (0, key_bytes) if operand == "key" else (key_bytes, page_sizes[index])
        columns = torch.arange(*span, device=cache.device)
        regions = cache.pool[offsets[:, None] + columns]
        stored = unpack_region(region_format, operand, regions, cache.head_dim, cache.page_size)
        # Rows that no entry calls live may hold anything, even codes that no table has.
        live_of_page = torch.zeros(offsets.shape[0], dtype=torch.int64, device=cache.device)
        counts = table.live_tokens[entries].to(torch.int64)
        live_of_page.scatter_reduce_(0, page_of_entry, counts, "amax")
        rows = torch.arange(cache.page_size, device=cache.device)
        stored = zeroed_rows(stored, rows >= live_of_page[:, None])
        yield TierPages(region_format, entries, page_of_entry, stored)
