"""Encoding on the GPU gives the bytes of the CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sphkv_codebooks.codebook import Codebook
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.cache_builder import build_cache
from sphkv_kernels.encode import encode, encode_rows
from sphkv_kernels.page_slots import SequenceTokens
from sphkv_kernels.pages import page_bytes
from sphkv_kernels.tier import PageError, TierFormat
from tests.gpu.cases import needs_cuda, tier_set
from tests.kernels.cases import NATIVE_CODES, native_tiers, random_tokens

pytestmark = [pytest.mark.gpu, needs_cuda]


def vectors(n_pages: int, page_size: int, head_dim: int, seed: int) -> torch.Tensor:
    """Keys and values: Gaussian of many sizes, zeros, axes, signed zeros, subnormals, ties."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((2, n_pages, page_size, head_dim), generator=generator)
    x *= 10 ** torch.empty((2, n_pages, page_size, 1)).uniform_(-3, 2, generator=generator)
    x[:, 0, 0] = 0
    x[:, 0, 1] = -0.0
    x[:, 0, 2] = 0
    x[:, 0, 2, 5] = -3.0
    x[:, 0, 3] = 1e-41
    x[:, 0, 4] = 1.0
    x[:, 0, 5, ::2] = -0.0
    x[:, 0, 6] = torch.randint(-3, 4, (head_dim,), generator=generator).float()
    x[:, 0, 7] = 60000.0 / head_dim**0.5
    return x


def n_differing(tier: TierFormat, x: torch.Tensor, rotation: Rotation | None = None) -> int:
    on_cpu = encode(tier, x[0], x[1], rotation=rotation)
    there = x.cuda()
    on_gpu = encode(tier, there[0], there[1], rotation=rotation).cpu()
    assert on_cpu.shape == on_gpu.shape
    return int((on_cpu != on_gpu).sum())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("tier", range(10))
def test_pages_are_those_of_the_cpu(head_dim: int, tier: int) -> None:
    one = native_tiers(head_dim)[tier]
    for page_size, n_pages in ((16, 7), (32, 100), (64, 3)):
        assert n_differing(one, vectors(n_pages, page_size, head_dim, tier)) == 0


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("tier", [0, 1, 2, 5, 7])
def test_hadamard_rotation_is_exact_too(head_dim: int, tier: int) -> None:
    one = native_tiers(head_dim)[tier]
    x = vectors(50, 32, head_dim, tier)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert n_differing(one, x.to(dtype), Rotation("hadamard", head_dim, seed=3)) == 0


def test_a_cache_built_there_is_that_of_the_cpu() -> None:
    """Full pages by the kernel, pages with dead rows and codes it does not have by torch."""
    tiers = native_tiers(128)
    tokens = random_tokens(1500, 2, 128, len(tiers), 32, seed=3)
    there = SequenceTokens(
        *(x.cuda() for x in (tokens.keys, tokens.values)),
        *(x.cuda() for x in (tokens.tier_of_token, tokens.page_of_token)),
        tokens.positions.cuda(),
    )
    here = build_cache(tiers, 32, [tokens])
    for uses_kernel in (True, False):
        found = build_cache(tiers, 32, [there], uses_kernel=uses_kernel)
        for name in ("offsets", "tiers", "live_tokens", "starts"):
            assert torch.equal(
                getattr(found.page_table, name).cpu(), getattr(here.page_table, name)
            )
        full = torch.nonzero(here.page_table.live_tokens == 32).flatten().tolist()
        assert len(full) > 50
        sizes = here.tier_page_bytes()
        n_other = 0
        for entry in full:
            first = int(here.page_table.offsets[entry])
            page = slice(first, first + sizes[int(here.page_table.tiers[entry])])
            n_other += int((found.pool[page].cpu() != here.pool[page]).sum())
        if uses_kernel:
            assert n_other == 0
        else:  # torch's sums on the device have another order
            assert n_other <= 1e-2 * here.pool.numel()


@pytest.mark.parametrize("gain", ["least_squares", "unbiased"])
@pytest.mark.parametrize("code", range(len(NATIVE_CODES)))
def test_gains_are_exact_too(gain: str, code: int) -> None:
    bits, radius = NATIVE_CODES[code]
    one = SphericalCode.analytic("gain", 128, bits, radius, gain=gain)  # type: ignore[arg-type]
    assert n_differing(TierFormat.spherical(one), vectors(60, 32, 128, code)[:, :, 8:24]) == 0


def test_quadrants_may_differ() -> None:
    code = SphericalCode.analytic("uneven", 128, (4, 2, 2, 2), "fp16")
    first = code.codebooks[0]
    edges = np.sort(np.random.default_rng(1).uniform(0.05, 2 * np.pi - 0.05, first.n_cells))
    centres = np.append((edges[1:] + edges[:-1]) / 2, (edges[-1] + 2 * np.pi) / 2)
    uneven = code.with_codebooks("uneven", [Codebook(1, centres, edges, True), *code.codebooks[1:]])
    assert n_differing(TierFormat.spherical(uneven), vectors(60, 32, 128, 1)) == 0


def test_haar_rotation_differs_in_ties_alone() -> None:
    """A matrix product sums in another order: codes within its rounding of a threshold may move."""
    (one,) = tier_set(128, 3)
    x = vectors(200, 32, 128, 2)[:, 1:]
    differing = n_differing(one, x, Rotation("haar", 128))
    n_fields = x.numel()  # about one field per coordinate
    assert differing <= 1e-4 * n_fields, f"{differing} bytes of about {n_fields} fields"


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("tier", range(10))
def test_rows_fill_the_pages_that_encode_makes(head_dim: int, tier: int) -> None:
    one = native_tiers(head_dim)[tier]
    rotation = Rotation("hadamard", head_dim)
    keys, values = vectors(3, 32, head_dim, tier).to(torch.bfloat16).cuda()
    whole = encode(one, keys, values, rotation=rotation)
    pool = torch.full((5 * whole.shape[1],), 0xA5, dtype=torch.uint8, device="cuda")
    page = torch.tensor([4, 0, 2], device="cuda")
    for row in torch.randperm(32, generator=torch.Generator().manual_seed(1)).tolist():
        encode_rows(
            one, keys[:, row], values[:, row], pool, page * whole.shape[1],
            torch.full((3,), row, dtype=torch.int32, device="cuda"),
            page_size=32, rotation=rotation,
        )  # fmt: skip
    pages = pool.view(5, -1)
    assert torch.equal(pages[page], whole)
    assert bool((pages[[1, 3]] == 0xA5).all())


def test_a_prefill_is_read_where_it_lies() -> None:
    (one,) = tier_set(128, 3)
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn((2, 96, 3, 128), generator=generator).to(torch.bfloat16).cuda()

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x.view(3, 32, 3, 128).permute(2, 0, 1, 3)

    pages = encode(one, by_head(keys), by_head(values))
    for head in range(3):
        alone = encode(one, keys[:, head].reshape(3, 32, 128), values[:, head].reshape(3, 32, 128))
        assert torch.equal(pages[head], alone)


@pytest.mark.parametrize("tier", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_what_cannot_be_stored_is_refused(tier: int, bad: float) -> None:
    (one,) = tier_set(128, tier) if tier != 1 else (TierFormat.dense(),)
    x = vectors(4, 32, 128, 1).cuda()
    x[1, 2, 30, 127] = bad
    with pytest.raises(ValueError, match=r"NaN|does not fit|needs a scale"):
        encode(one, x[0], x[1])
    encode(one, x[0], x[1], check=False)


def test_dense_pages_hold_what_fp16_does() -> None:
    dense, x = TierFormat.dense(), vectors(4, 32, 128, 1).cuda()
    for limit in (65_400.0, 65_408.0):
        x[0, 3, 31, 0] = -limit
        for where in ("cuda", "cpu"):
            if limit < 65_408:
                encode(dense, *x.to(where))
            else:
                with pytest.raises(ValueError, match=r"more than 65504|too large"):
                    encode(dense, *x.to(where))


@pytest.mark.parametrize(("offset", "row"), [(0, 32), (0, -1), (8, 0), (-16, 0), (16, 0)])
def test_a_row_outside_the_pool_is_refused_and_nothing_written(offset: int, row: int) -> None:
    (one,) = tier_set(128, 3)
    keys = torch.randn(2, 128, device="cuda")
    pool = torch.full((page_bytes(one, 128, 32),), 7, dtype=torch.uint8, device="cuda")
    offsets = torch.tensor([0, offset], device="cuda")
    rows = torch.tensor([1, row], dtype=torch.int32, device="cuda")
    with pytest.raises(PageError, match="token 1: row"):
        encode_rows(one, keys, keys, pool, offsets, rows, page_size=32)
    assert bool((pool == 7).all())


def test_encoding_replays_in_a_graph() -> None:
    (one,) = tier_set(128, 3)
    x = vectors(4, 32, 128, 1).cuda()
    encode(one, x[0], x[1], check=False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = encode(one, x[0], x[1], check=False)
    x.copy_(vectors(4, 32, 128, 2))
    graph.replay()
    assert torch.equal(captured, encode(one, x[0], x[1]))


def test_shapes_are_checked() -> None:
    (one,) = tier_set(128, 3)
    keys = torch.zeros((4, 32, 128), device="cuda")
    with pytest.raises(PageError, match="must both be"):
        encode(one, keys, keys[:2])
    with pytest.raises(PageError, match="page_size"):
        encode(one, keys[:, :20], keys[:, :20])
    pool = torch.zeros(4096, dtype=torch.uint8, device="cuda")
    rows = torch.zeros(4, dtype=torch.int32, device="cuda")
    with pytest.raises(PageError, match="page_offsets is"):
        encode_rows(one, keys[:, 0], keys[:, 0], pool, rows, rows, page_size=32)
    rope = replace(SphericalCode.analytic("rope", 128), pairing="rope")
    with pytest.raises(PageError, match="native layouts"):
        encode_rows(
            TierFormat.spherical(rope), keys[:, 0], keys[:, 0], pool, rows.long(), rows,
            page_size=32,
        )  # fmt: skip
