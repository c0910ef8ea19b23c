"""The instruction estimate is that of the kernel as it is, not of one that once was."""

from pathlib import Path

import pytest

from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.cache_builder import build_cache
from sphkv_kernels.decode_cost import (
    LOOP_INSTRUCTIONS,
    LOOP_TOKENS,
    instructions_per_coordinate,
    position_term_cost,
)
from sphkv_kernels.page_cost import COMPACT_LOOP, page_costs
from sphkv_kernels.tier import TierFormat
from sphkv_kernels.variant import Variant
from tests.kernels.cases import NATIVE_CODES, random_tokens
from tests.kernels.sass import built, decode_loop, decode_loops, disassemble, disassembler


def code_of(bits: tuple[int, ...], radius: str, head_dim: int = 128) -> SphericalCode:
    return SphericalCode.analytic("code", head_dim, bits, radius)


needs_tools = pytest.mark.skipif(
    disassembler("nvdisasm") is None,
    reason="the nvidia-cuda-nvdisasm wheel (extra `test`) is not installed",
)


@needs_tools
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("bits_radius", NATIVE_CODES, ids=str)
def test_the_estimate_is_what_the_disassembly_says(
    bits_radius: tuple[tuple[int, ...], str], head_dim: int, tmp_path: Path
) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core (extra `cuda`) is not installed")
    code, n_warps = code_of(*bits_radius, head_dim), 8 if head_dim == 256 else 12
    variant = Variant((TierFormat.spherical(code),), head_dim, 1, n_warps=n_warps)
    loop = decode_loop(disassemble(built(variant, 90, tmp_path)))
    estimate = instructions_per_coordinate(code, code)
    assert estimate is not None
    # Another NVRTC or a small change of the kernel moves the loop by some per cent.
    assert estimate == pytest.approx(32 * loop.total / (LOOP_TOKENS * 2 * head_dim), rel=0.1)


@needs_tools
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_so_is_that_of_4222_r2_beside_another_code(head_dim: int, tmp_path: Path) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core (extra `cuda`) is not installed")
    codes = (code_of(bits, "lloyd_max:2", head_dim) for bits in ((4, 2, 2, 2), (3, 2, 2, 2)))
    tiers, n_warps = tuple(map(TierFormat.spherical, codes)), 8 if head_dim == 256 else 12
    cubin = built(Variant(tiers, head_dim, 1, n_warps=n_warps), 90, tmp_path)
    loops = sorted(loop.total for loop in decode_loops(disassemble(cubin)))
    assert loops == pytest.approx(
        [LOOP_INSTRUCTIONS["quad"][head_dim], COMPACT_LOOP[head_dim]], rel=0.1
    )


@needs_tools
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_page_of_two_codes_costs_what_its_loop_takes(head_dim: int, tmp_path: Path) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core (extra `cuda`) is not installed")
    n_warps = 8 if head_dim == 256 else 12
    keys = code_of((4, 2, 2, 2), "lloyd_max:2", head_dim)
    tiers = [
        TierFormat.spherical(keys),
        TierFormat.spherical(keys, code_of((3, 2, 2, 2), "lloyd_max:2", head_dim)),
    ]
    costs, loops = [], []
    for tier in tiers:
        tokens = random_tokens(16, 1, head_dim, 1, 16, 1, drop_fraction=0.0)
        (cost,), _ = page_costs(build_cache((tier,), 16, [tokens]), (1,))
        variant = Variant((tier,), head_dim, 1, n_warps=n_warps)
        costs.append(cost)
        loops.append(decode_loop(disassemble(built(variant, 90, tmp_path))).total)
    assert costs[1] / costs[0] == pytest.approx(loops[1] / loops[0], rel=0.06)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_native_code_has_an_estimate_and_no_other(head_dim: int) -> None:
    codes = [code_of(bits, radius, head_dim) for bits, radius in NATIVE_CODES]
    costs = [instructions_per_coordinate(code, code) for code in codes]
    assert all(cost is not None and 1.0 < cost < 8.0 for cost in costs)
    mixed = instructions_per_coordinate(codes[0], codes[5])
    assert mixed == pytest.approx((costs[0] + costs[5]) / 2)  # type: ignore[operator]
    other = SphericalCode.analytic("x", head_dim, radius="fp16", n_cells=(12, 4, 4, 4))
    assert instructions_per_coordinate(other, codes[0]) is None


def test_more_rope_pairs_never_cost_less() -> None:
    costs = [position_term_cost(n_pairs) for n_pairs in range(130)]
    assert costs[0] == 0.0
    assert costs == sorted(costs)
    assert costs[1] == costs[4] > 0.0  # pairs come in groups
    assert costs[128] > costs[32] > costs[8]
    with pytest.raises(ValueError, match="-1 RoPE pairs"):
        position_term_cost(-1)
