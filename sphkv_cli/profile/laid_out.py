"""The bytes of a cache as it lies in memory, by name; they sum to what is allocated.

    code_rate      = 8 (codes + radii + norms + dense) / coordinates
    laid_out_rate  = 8 (all terms) / coordinates

over all key and value coordinates of the context, dropped tokens included: a dropped token costs
nothing and still counts.  Fixed tables (rotation, key means, centroids) are those of one context.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sphkv_cli.allocation.layout import ENTRY_BYTES, START_BYTES, position_bytes
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.code_fields import has_norm, radius_bits
from sphkv_kernels.pages import page_bytes
from sphkv_kernels.tier import RegionFormat, TierFormat
from sphkv_kernels.token_stream import angle_bits


@dataclass(frozen=True)
class LaidOutTerms:
    """Bytes.  codes: angle and int8 codes; radii; norms: fp16 norms and int8 scales; dense: bf16
    rows; padding: dead rows, unused bits, alignment; page_table; positions; fixed_tables."""

    codes: float = 0.0
    radii: float = 0.0
    norms: float = 0.0
    dense: float = 0.0
    padding: float = 0.0
    page_table: float = 0.0
    positions: float = 0.0
    fixed_tables: float = 0.0

    @property
    def payload(self) -> float:
        """What the code rate counts."""
        return self.codes + self.radii + self.norms + self.dense

    @property
    def total(self) -> float:
        """Everything."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    def __add__(self, other: "LaidOutTerms") -> "LaidOutTerms":
        return LaidOutTerms(
            *(getattr(self, field.name) + getattr(other, field.name) for field in fields(self))
        )


def total_of(terms: Iterable[LaidOutTerms]) -> LaidOutTerms:
    """The sum."""
    total = LaidOutTerms()
    for term in terms:
        total = total + term
    return total


def cache_terms(cache: PagedCache, *, stores_positions: bool) -> LaidOutTerms:
    """The bytes of one layer's cache, without fixed tables.

    stores_positions: whether serving needs the positions of this layer (a sliding window, centring
    before RoPE); the cache may carry them only to be read back.
    """
    table = cache.page_table
    pages = torch.bincount(table.tiers.to(torch.int64), minlength=len(cache.tiers))
    tokens = torch.zeros(len(cache.tiers), dtype=torch.int64, device=cache.device)
    tokens.index_add_(0, table.tiers.to(torch.int64), table.live_tokens.to(torch.int64))
    positions = 0
    if stores_positions and cache.positions is not None:
        positions = cache.positions.numel() * cache.positions.element_size()
    return page_terms(cache.tiers, cache.head_dim, cache.page_size, pages, tokens) + LaidOutTerms(
        page_table=table.n_bytes, positions=positions
    )


def uniform_terms(
    tiers: tuple[TierFormat, ...],
    tier: int,
    *,
    head_dim: int,
    page_size: int,
    n_kv_heads: int,
    n_context: int,
    stores_positions: bool,
) -> LaidOutTerms:
    """What `cache_terms` says of one layer with every token in one tier, without building it."""
    per_head = -(-n_context // page_size)
    pages = torch.zeros(len(tiers), dtype=torch.int64)
    tokens = torch.zeros(len(tiers), dtype=torch.int64)
    pages[tier], tokens[tier] = per_head * n_kv_heads, n_context * n_kv_heads
    entries = per_head * n_kv_heads
    return page_terms(tiers, head_dim, page_size, pages, tokens) + LaidOutTerms(
        page_table=entries * ENTRY_BYTES + START_BYTES * (n_kv_heads + 1),
        positions=entries * page_size * position_bytes(n_context) if stores_positions else 0,
    )


def page_terms(
    tiers: tuple[TierFormat, ...], head_dim: int, page_size: int, pages: Tensor, tokens: Tensor
) -> LaidOutTerms:
    """The bytes of pages: `pages` and live `tokens` of each tier, ``(n_tiers) int64``."""
    total = LaidOutTerms()
    for tier, n_pages, n_tokens in zip(tiers, pages.tolist(), tokens.tolist(), strict=True):
        if n_pages == 0:
            continue
        vector = _vector_bytes(tier.key_format, head_dim) + _vector_bytes(
            tier.value_format, head_dim
        )
        payload = LaidOutTerms(
            *(n_tokens * part for part in (vector.codes, vector.radii, vector.norms, vector.dense))
        )
        padding = n_pages * page_bytes(tier, head_dim, page_size) - payload.total
        total = total + payload + LaidOutTerms(padding=padding)
    return total


def _vector_bytes(kind: RegionFormat, head_dim: int) -> LaidOutTerms:
    if isinstance(kind, SphericalCode):
        return LaidOutTerms(
            codes=angle_bits(kind.head_dim, kind.n_cells) / 8,
            radii=kind.n_radii * radius_bits(kind) / 8,
            norms=2.0 if has_norm(kind) else 0.0,
        )
    if kind == "int8":
        return LaidOutTerms(codes=float(head_dim), norms=2.0)
    return LaidOutTerms(dense=2.0 * head_dim)
