"""Codes, stored vectors and caches that the page and reference tests build on."""

import numpy as np
import torch
from hypothesis import strategies as st

from sphkv_codebooks.codebook import Codebook
from sphkv_codebooks.encoded import EncodedVectors
from sphkv_codebooks.radius import MinifloatRadius, RadiusCoding, radius_coding_from_spec
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.decode import AttentionPlan
from sphkv_kernels.int8_code import Int8Vectors
from sphkv_kernels.page_slots import SequenceTokens
from sphkv_kernels.plan import make_plan
from sphkv_kernels.tier import RegionFormat, TierFormat
from sphkv_kernels.vectors import StoredVectors

NATIVE_CODES = (
    ((4, 2, 2, 2), "fp16"),
    ((4, 2, 2, 2), "lloyd_max:2"),
    ((4, 3, 3, 3), "lloyd_max:3"),
    ((4, 3, 3, 3), "minifloat:5,6"),
    ((5, 3, 3, 3), "lloyd_max:3"),
    ((3, 2, 2, 2), "lloyd_max:2"),
    ((3, 1, 1, 1), "lloyd_max:1"),
)


def even_book(level: int, n_cells: int) -> Codebook:
    """Cells of equal width: packing does not care where the thresholds lie."""
    width = (2 * np.pi if level == 1 else np.pi / 2) / n_cells
    centroids = width * (np.arange(n_cells) + 0.5)
    first = 0 if level == 1 else 1
    return Codebook(level, centroids, width * np.arange(first, n_cells), is_circle=level == 1)


def even_code(
    head_dim: int, n_cells: tuple[int, ...], radius: str, pairing: str = "adjacent"
) -> SphericalCode:
    """A code with even books."""
    coding: RadiusCoding = radius_coding_from_spec(radius, 1 << len(n_cells), head_dim)
    books = tuple(even_book(level, cells) for level, cells in enumerate(n_cells, start=1))
    name = f"{'-'.join(map(str, n_cells))}-{radius}"
    return SphericalCode(
        name,
        head_dim,
        len(n_cells),
        n_cells,
        pairing,
        coding,
        "none",
        books,  # type: ignore[arg-type]
    )


@st.composite
def even_codes(
    draw: st.DrawFn, head_dims: tuple[int, ...] = (8, 16, 64, 128, 256)
) -> SphericalCode:
    """Any depth, any numbers of cells (powers of two or not), every radius coding."""
    head_dim = draw(st.sampled_from(head_dims))
    full = head_dim.bit_length() - 1
    depth = draw(st.integers(1, min(7, full)))
    n_cells = tuple(draw(st.lists(st.integers(1, 40), min_size=depth, max_size=depth)))
    radii = ["fp16", "minifloat:5,6", "minifloat:4,4"]
    radii += ["norm"] if depth == full else ["lloyd_max:1", "lloyd_max:3"]
    return even_code(head_dim, n_cells, draw(st.sampled_from(radii)))


def random_stored(
    region_format: RegionFormat, shape: tuple[int, ...], head_dim: int, seed: int
) -> StoredVectors:
    """Vectors whose every field is drawn from its whole range."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *tail: int) -> torch.Tensor:
        return torch.randint(0, high, (*shape, *tail), generator=generator)

    def floats(dtype: torch.dtype, *tail: int) -> torch.Tensor:
        return torch.randn((*shape, *tail), generator=generator).abs().to(dtype)

    if region_format == "dense":
        return floats(torch.bfloat16, head_dim)
    if region_format == "int8":
        codes = (integers(255, head_dim) - 127).to(torch.int8)
        return Int8Vectors(codes, floats(torch.float16))
    assert isinstance(region_format, SphericalCode)
    coding = region_format.radius_coding
    n_radii = region_format.n_radii
    is_fp16 = coding.spec == "fp16"
    radius_codes = None
    if coding.bits_per_radius and not is_fp16:
        is_minifloat = isinstance(coding, MinifloatRadius)
        n_values = len(coding.values) if isinstance(coding, MinifloatRadius) else 0
        radius_codes = integers(n_values or 1 << coding.bits_per_radius, n_radii)
        radius_codes = radius_codes.to(torch.int16 if is_minifloat else torch.uint8)
    return EncodedVectors(
        tuple(
            integers(cells, count).to(torch.uint8)
            for cells, count in zip(region_format.n_cells, region_format.n_angles, strict=True)
        ),
        radius_codes,
        floats(torch.float16, n_radii) if is_fp16 else None,
        floats(torch.float16) if coding.norm_bits else None,
    )


def parts(stored: StoredVectors) -> list[torch.Tensor]:
    """Every tensor of stored vectors, in a fixed order."""
    if isinstance(stored, torch.Tensor):
        return [stored]
    if isinstance(stored, Int8Vectors):
        return [stored.codes, stored.scales]
    optional = (stored.radius_codes, stored.radii, stored.norms)
    return [*stored.angle_codes, *(part for part in optional if part is not None)]


def native_tiers(head_dim: int) -> tuple[TierFormat, ...]:
    """int8, dense, and one tier per native code; keys and values of the last one differ."""
    codes = [
        SphericalCode.analytic(f"c{i}", head_dim, bits, radius)
        for i, (bits, radius) in enumerate(NATIVE_CODES)
    ]
    tiers = [TierFormat.spherical(code) for code in codes]
    tiers.append(TierFormat.spherical(codes[0], codes[5]))
    return (TierFormat.int8(), TierFormat.dense(), *tiers)


def random_tokens(
    n_tokens: int,
    n_kv_heads: int,
    head_dim: int,
    n_tiers: int,
    page_size: int,
    seed: int,
    *,
    drop_fraction: float = 0.2,
) -> SequenceTokens:
    """Gaussian keys and values; per head random tiers, each tier's tokens cut into pages."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n_tokens, n_kv_heads)
    tier = torch.randint(0, n_tiers, shape, generator=generator)
    tier[torch.rand(shape, generator=generator) < drop_fraction] = -1
    return SequenceTokens(
        keys=torch.randn((*shape, head_dim), generator=generator),
        values=torch.randn((*shape, head_dim), generator=generator),
        tier_of_token=tier.to(torch.int8),
        page_of_token=pages_of(tier, page_size),
        positions=torch.arange(n_tokens, dtype=torch.int32),
    )


def pages_of(tier: torch.Tensor, page_size: int) -> torch.Tensor:
    """Page numbers: the tokens of each tier of a head, in order, page_size to a page."""
    page = torch.full(tier.shape, -1, dtype=torch.int32)
    for head in range(tier.shape[1]):
        first = 0
        # The last tier has the first pages: the order of tiers is not that of page numbers.
        for index in reversed(range(int(tier.max()) + 1 if tier.numel() else 0)):
            rows = torch.nonzero(tier[:, head] == index).flatten()
            page[rows, head] = (first + torch.arange(rows.numel()) // page_size).to(torch.int32)
            first += -(-rows.numel() // page_size)
    return page


def plan_without_kernels(
    cache: PagedCache, group_size: int = 4, *, check: bool = True, n_blocks: int = 3
) -> AttentionPlan:
    """The plan of a cache on the CPU, which has no kernel to launch."""
    nothing, work = torch.empty(0), make_plan(cache, n_blocks, check=check)
    return AttentionPlan(cache, group_size, work, 12, "fragment", 0, nothing, nothing, nothing, -1)
