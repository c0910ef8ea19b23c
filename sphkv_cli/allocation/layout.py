"""The bytes that a plan really takes, term by term.

    laid_out = sum over kept pages (page_bytes(tier) + entry + positions) + page starts + fixed

page_bytes comes from the page format itself (sphkv_kernels.pages); `codes` is the part of it that
holds codes, radii and norms of live tokens, `padding` the rest (dead rows of partial pages, unused
bits, alignment).  Positions are stored where a window or centring before RoPE needs them.  Fixed
tables (rotation, key means, balancing, centroids) are counted once per context, as if it were
served alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sphkv_codebooks.balancing import balancing_bytes
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotary import kept_pairs
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.pages import page_bytes
from sphkv_kernels.tier import RegionFormat, TierFormat

Int = NDArray[np.int64]

ENTRY_BYTES = 8 + 1 + 2
"""A page-table entry: offset int64, tier int8, live_tokens int16 (page_table.py)."""
START_BYTES = 4


def position_bytes(n_context: int) -> int:
    """Of one token's position on a page: uint16 where every position of the context fits."""
    return 2 if n_context <= 1 << 16 else 4


@dataclass(frozen=True)
class LaidOutBytes:
    """Bytes by purpose; `codes` may be the fractional sum of whole bits rounded up."""

    codes: int
    padding: int
    page_table: int
    positions: int
    fixed_tables: int

    @property
    def total(self) -> int:
        return self.codes + self.padding + self.page_table + self.positions + self.fixed_tables


@dataclass(frozen=True)
class PageLayout:
    """How the pages of a context are laid out; options are 0 = drop, then `tiers` in order.

    tiers: in order of non-decreasing page bytes (`order_tiers`).
    page_size: tokens per page.
    stores_positions: (n_layers) whether a layer's pages carry positions (a sliding window, or a
        frame that needs them).
    fixed_bytes: fixed tables of one context.
    position_bytes: of one position, see the function of that name.
    """

    tiers: tuple[TierFormat, ...]
    head_dim: int
    page_size: int
    n_kv_heads: int
    stores_positions: tuple[bool, ...]
    fixed_bytes: int
    position_bytes: int = 2

    def __post_init__(self) -> None:
        sizes = self.tier_bytes()
        if np.any(np.diff(sizes) < 0):
            raise ValueError("tiers must come in order of non-decreasing page bytes")

    @property
    def n_layers(self) -> int:
        return len(self.stores_positions)

    @property
    def option_names(self) -> tuple[str, ...]:
        return ("drop", *(tier.name for tier in self.tiers))

    def tier_bytes(self) -> Int:
        """(n_tiers) bytes of one page."""
        sizes = [page_bytes(tier, self.head_dim, self.page_size) for tier in self.tiers]
        return np.array(sizes, dtype=np.int64)

    def option_bytes(self) -> Int:
        """(n_layers, n_options) bytes of one page with its table entry and positions."""
        sizes = np.zeros((self.n_layers, 1 + len(self.tiers)), dtype=np.int64)
        positions = (
            self.position_bytes * self.page_size * np.array(self.stores_positions, dtype=np.int64)
        )
        sizes[:, 1:] = self.tier_bytes() + ENTRY_BYTES + positions[:, None]
        return sizes

    def overhead_bytes(self) -> int:
        """Bytes that no plan avoids: page starts and fixed tables."""
        return self.n_layers * START_BYTES * (self.n_kv_heads + 1) + self.fixed_bytes

    def n_pages(self, n_context: int) -> int:
        """Pages of one KV head."""
        return -(-n_context // self.page_size)

    def dense_bytes(self, n_context: int) -> int:
        """Laid-out bytes with every page in the largest tier."""
        pages = self.n_pages(n_context) * self.n_kv_heads
        return pages * int(self.option_bytes()[:, -1].sum()) + self.overhead_bytes()

    def n_coordinates(self, n_context: int) -> int:
        """Key and value coordinates of a context."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * n_context

    def measure(self, option_of_page: NDArray[np.int8], n_context: int) -> LaidOutBytes:
        """Bytes of a plan.

        Args:
            option_of_page: (n_layers, n_kv_heads, n_pages); the last page of a head holds the
                tokens that the others leave over.
            n_context: tokens.
        """
        if self.position_bytes < position_bytes(n_context) and any(self.stores_positions):
            raise ValueError(
                f"positions of {n_context} tokens do not fit {self.position_bytes} bytes"
            )
        n_pages = option_of_page.shape[2]
        live = np.full(n_pages, self.page_size, dtype=np.int64)
        live[-1] = n_context - (n_pages - 1) * self.page_size
        token_bits = np.array([0.0, *(tier_bits(tier, self.head_dim) for tier in self.tiers)])
        codes = int(np.ceil((token_bits[option_of_page] * live).sum() / 8))
        kept = option_of_page > 0
        pages = int(np.array([0, *self.tier_bytes()])[option_of_page].sum())
        with_positions = kept & np.array(self.stores_positions)[:, None, None]
        return LaidOutBytes(
            codes=codes,
            padding=pages - codes,
            page_table=int(kept.sum()) * ENTRY_BYTES + self.overhead_bytes() - self.fixed_bytes,
            positions=int(with_positions.sum()) * self.position_bytes * self.page_size,
            fixed_tables=self.fixed_bytes,
        )


def order_tiers(
    tiers: Sequence[TierFormat], head_dim: int, page_size: int
) -> tuple[TierFormat, ...]:
    """Tiers by rising page bytes; the given order breaks ties."""
    return tuple(sorted(tiers, key=lambda tier: page_bytes(tier, head_dim, page_size)))


def tier_bits(tier: TierFormat, head_dim: int) -> float:
    """Bits of one token's key and value: codes, radii, norms, scales; nothing padded."""
    return _vector_bits(tier.key_format, head_dim) + _vector_bits(tier.value_format, head_dim)


def fixed_table_bytes(frames: FrameSet, tiers: Sequence[TierFormat]) -> int:
    """Bytes of rotation, means and centroids (float32; Hadamard signs as bits) and of balancing
    (float16, a triangle or a diagonal); of a mean before RoPE the pairs it keeps."""
    n_bytes = _mean_bytes(frames)
    rotation = frames.rotation
    if rotation.kind == "haar":
        n_bytes += 4 * rotation.head_dim**2
    elif rotation.kind == "hadamard":
        n_bytes += -(-rotation.head_dim // 8)
    if frames.balancing is not None:
        n_bytes += balancing_bytes(frames.balancing)
    codes = {
        code.digest: code
        for tier in tiers
        for code in (tier.key_code, tier.value_code)
        if code is not None
    }
    n_bytes += 4 * sum(sum(code.n_cells) for code in codes.values())
    return n_bytes


def stores_positions(windows: Sequence[int], frames: FrameSet) -> tuple[bool, ...]:
    """(n_layers) whether pages carry positions: layers with a window, or centred before RoPE."""
    return tuple(
        window > 0 or frames.needs_positions(layer) for layer, window in enumerate(windows)
    )


def _mean_bytes(frames: FrameSet) -> int:
    if frames.key_mean is None:
        return 0
    n_bytes, frequencies = 0, set()
    for layer, mean in enumerate(frames.key_mean):
        centring = frames.centring_of(layer)
        if centring == "post_rope":
            n_bytes += 4 * mean.size
        elif centring == "pre_rope":
            assert frames.inv_freq is not None
            # Two coordinates and the number of each kept pair.
            n_bytes += (2 * 4 + 1) * int(kept_pairs(mean).sum())
            frequencies.add(frames.inv_freq[layer].tobytes())
            if frames.residual_mean is not None and frames.residual_mean[layer].any():
                n_bytes += 4 * mean.size
    return n_bytes + sum(len(row) for row in frequencies)


def _vector_bits(region_format: RegionFormat, head_dim: int) -> float:
    if isinstance(region_format, SphericalCode):
        return float(region_format.bits_per_vector)
    return 8.0 * head_dim + 16 if region_format == "int8" else 16.0 * head_dim
