"""Encoding on the GPU gives the bytes of the CPU, but for ties of norms within rounding."""

from __future__ import annotations

import pytest
import torch

from sphkv_kernels.encode import encode
from sphkv_kernels.tier import PageError
from tests.gpu.cases import needs_cuda, tier_set

pytestmark = [pytest.mark.gpu, needs_cuda]


@pytest.mark.parametrize("tier", range(10))
def test_pages_are_those_of_the_cpu(tier: int) -> None:
    (one,) = tier_set(128, tier)
    generator = torch.Generator().manual_seed(tier)
    keys, values = torch.randn((2, 200, 32, 128), generator=generator)
    on_cpu = encode(one, keys, values)
    on_gpu = encode(one, keys.cuda(), values.cuda()).cpu()
    differing = int((on_cpu != on_gpu).sum())
    # A norm is a sum that the two devices round in different orders: a tie there moves its fp16 or
    # a radius code. Angles have no such freedom.
    assert differing <= 1e-4 * on_cpu.numel(), f"{differing} of {on_cpu.numel()} bytes differ"


def test_shapes_are_checked() -> None:
    (one,) = tier_set(128, 3)
    keys = torch.zeros((4, 32, 128), device="cuda")
    with pytest.raises(PageError, match="must both be"):
        encode(one, keys, keys[:2])
    with pytest.raises(PageError, match="page_size"):
        encode(one, keys[:, :20], keys[:, :20])
