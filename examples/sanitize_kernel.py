"""Small decode and logit launches over mixed tiers, for NVIDIA's checkers:

compute-sanitizer --tool memcheck python examples/sanitize_kernel.py
compute-sanitizer --tool racecheck python examples/sanitize_kernel.py
"""

from __future__ import annotations

import torch

from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.decode import ada_decode, ada_logits, plan
from sphkv_kernels.synthetic import tiled_cache
from sphkv_kernels.tier import TierFormat


def main() -> None:
    codes = [
        SphericalCode.analytic("a", 128, (4, 2, 2, 2), "fp16"),
        SphericalCode.analytic("b", 128, (3, 2, 2, 2), "lloyd_max:2"),
    ]
    tiers = (*map(TierFormat.spherical, codes), TierFormat.int8(), TierFormat.dense())
    generator = torch.Generator().manual_seed(42)
    pages = torch.randint(-1, 4, (3, 2, 11), generator=generator)
    cache = tiled_cache(tiers, pages, 32, 2, 128, n_distinct=8)
    query = torch.randn(3, 8, 128, generator=generator).cuda()
    for n_blocks in (3, 40):
        attention_plan = plan(cache, 4, n_blocks=n_blocks)
        for _ in range(2):
            result = ada_decode(query, cache, 0.09, plan=attention_plan)
        logits = ada_logits(query, cache, plan=attention_plan)
        torch.cuda.synchronize()
        assert torch.isfinite(result.output).all()
        print(f"{n_blocks} blocks: {float(result.output.norm()):.6f}, {logits.pages.shape}")


if __name__ == "__main__":
    main()
