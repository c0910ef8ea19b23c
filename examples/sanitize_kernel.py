"""Small framing, encode, decode and logit launches over mixed tiers, for NVIDIA's checkers.

compute-sanitizer --tool memcheck python examples/sanitize_kernel.py
compute-sanitizer --tool racecheck python examples/sanitize_kernel.py
"""

from __future__ import annotations

import argparse

import torch
from script import require_gpu, run

from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.benchmark import TokenOrder, random_term, with_positions
from sphkv_kernels.decode import ada_decode, ada_logits, plan
from sphkv_kernels.encode import encode, encode_rows
from sphkv_kernels.frame_tensors import FrameTensors
from sphkv_kernels.framing import frame_tokens, unframe_outputs
from sphkv_kernels.pages import page_bytes
from sphkv_kernels.synthetic import tiled_cache
from sphkv_kernels.tier import TierFormat


def frame_of_ones(n_q_heads: int, n_kv_heads: int, d: int, n_pairs: int) -> FrameTensors:
    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, device="cuda")

    return FrameTensors(
        ones(n_q_heads, d, d),
        ones(n_kv_heads, d, d),
        ones(d, d),
        ones(d, d),
        n_q_heads,
        n_kv_heads,
        centre=ones(n_kv_heads, d),
        mean=ones(n_kv_heads, d),
        turned=ones(n_kv_heads, d),
        position=ones(n_q_heads, d, 2, n_pairs),
        frequencies=ones(n_kv_heads, n_pairs),
        offset=ones(n_q_heads, d),
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    require_gpu()
    codes = [
        SphericalCode.analytic("a", 128, (4, 2, 2, 2), "fp16"),
        SphericalCode.analytic("b", 128, (3, 2, 2, 2), "lloyd_max:2"),
    ]
    tiers = (*map(TierFormat.spherical, codes), TierFormat.int8(), TierFormat.dense())
    generator = torch.Generator().manual_seed(42)
    pages = torch.randint(-1, 4, (3, 2, 11), generator=generator)
    plain = tiled_cache(tiers, pages, 32, 2, 128, n_distinct=8)
    term = random_term(plain, 4, 6, seed=42)
    query = torch.randn(3, 8, 128, generator=generator).cuda()
    cases: tuple[tuple[int, TokenOrder, int], ...] = (
        (3, "runs", 352),
        (40, "gaps", 352),
        (7, "spread", 60_000),
    )
    for n_blocks, order, n_tokens in cases:
        cache = with_positions(plain, n_tokens, order)
        attention_plan = plan(cache, 4, n_blocks=n_blocks)
        for _ in range(2):
            result = ada_decode(query, cache, 0.09, plan=attention_plan)
            result = ada_decode(query, cache, 0.09, position_term=term, plan=attention_plan)
        logits = ada_logits(query, cache, position_term=term, plan=attention_plan)
        torch.cuda.synchronize()
        assert torch.isfinite(result.output).all()
        print(f"{n_blocks} blocks: {float(result.output.norm()):.6f}, {logits.pages.shape}")
    # More codes than have room: their tables take turns.
    mixed = tuple(
        TierFormat.spherical(SphericalCode.analytic(f"code {i}", 128, bits, radius))
        for i, (bits, radius) in enumerate(
            [
                ((3, 1, 1, 1), "lloyd_max:1"),
                ((3, 2, 2, 2), "lloyd_max:2"),
                ((4, 2, 2, 2), "lloyd_max:2"),
                ((4, 3, 3, 3), "lloyd_max:3"),
                ((5, 3, 3, 3), "lloyd_max:3"),
            ]
        )
    )
    pages = torch.randint(-1, 6, (3, 2, 30), generator=generator)
    cache = tiled_cache((*mixed, TierFormat.int8()), pages, 32, 2, 128, n_distinct=4)
    for n_blocks in (2, 40):
        attention_plan = plan(cache, 4, n_blocks=n_blocks)
        result = ada_decode(query, cache, 0.09, plan=attention_plan)
        logits = ada_logits(query, cache, plan=attention_plan)
        assert torch.isfinite(result.output).all()
        print(f"six tiers, {n_blocks} blocks: {float(result.output.norm()):.6f}")
    for n in (1, 5):
        size = 2 * n * 2 * 3
        tail = torch.full((size, 128), torch.nan, dtype=torch.bfloat16, device="cuda")
        rows = 3 * torch.arange(2 * n * 2, device="cuda") + 1
        vectors = torch.randn(n, 8 + 2 + 2, 128, generator=generator).to(torch.bfloat16).cuda()
        turns = (torch.ones(n, 1, 128, device="cuda"), torch.zeros(n, 1, 128, device="cuda"))
        frame = frame_of_ones(8, 2, 128, n_pairs=6)
        parts = vectors.split([8, 2, 2], dim=1)
        framed = frame_tokens(frame, *parts, tail=tail, rows=rows, turns=turns)
        back = unframe_outputs(frame, framed.query, torch.bfloat16)
        assert torch.isfinite(back).all() and int(tail.isfinite().sum()) == size // 3 * 128
        print(f"frame {n}: {float(back.float().norm()):.1f}")
    rotation = Rotation("hadamard", 128)
    keys, values = torch.randn((2, 3, 32, 128), generator=generator).to(torch.bfloat16).cuda()
    for tier in tiers:
        n_bytes = page_bytes(tier, 128, 32)
        pool = encode(tier, keys, values, rotation=rotation).reshape(-1)
        where = n_bytes * torch.arange(3, device="cuda")
        row = torch.full((3,), 17, dtype=torch.int32, device="cuda")
        before = pool.clone()
        encode_rows(
            tier, keys[:, 17], values[:, 17], pool, where, row, page_size=32, rotation=rotation
        )
        assert torch.equal(pool, before)
        print(f"encode {tier.name}: {pool.numel()} bytes")


if __name__ == "__main__":
    run(main)
