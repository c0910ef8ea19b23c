"""The baselines do the work that they are timed for."""

import pytest
import torch

from sphkv_kernels.dense_attention import (
    dense_baselines,
    fastest,
    flashinfer_step,
    fp8_sentence,
    has_flashinfer,
)
from tests.gpu.cases import needs_cuda

pytestmark = [pytest.mark.gpu, needs_cuda]


def test_a_baseline_of_every_backend_is_timed_or_says_why_not() -> None:
    baselines = dense_baselines(2, 2, 100, 4, 128, n_samples=5)
    assert len({b.name for b in baselines}) == len(baselines) == (7 if has_flashinfer() else 3)
    for one in baselines:
        assert (one.latency is None) == bool(one.reason)
    best = fastest(baselines, "bf16")
    assert best is not None
    assert best.latency is not None
    others = [b.latency.median_us for b in baselines if b.kv_format == "bf16" and b.latency]
    assert best.latency.median_us == min(others)
    fp8 = fastest(baselines, "fp8")
    assert (fp8 is None) == fp8_sentence(baselines).startswith("No fp8")
    assert (fp8 is None) == (not has_flashinfer())


@pytest.mark.skipif(not has_flashinfer(), reason="FlashInfer is not installed")
@pytest.mark.parametrize("tensor_cores", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_flashinfer_attends_to_all_tokens(dtype: torch.dtype, tensor_cores: bool) -> None:
    generator = torch.Generator(device="cuda").manual_seed(3)
    query = torch.randn((2, 8, 128), generator=generator, device="cuda").to(torch.bfloat16)
    shape = (2 * 7, 16, 2, 128)
    keys, values = (
        torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(2)
    )
    result = flashinfer_step(query, keys, values, 100, tensor_cores=tensor_cores)()

    def tokens(pages: torch.Tensor) -> torch.Tensor:
        of_head = pages.double().reshape(2, 7 * 16, 2, 128)[:, :100].transpose(1, 2)
        return of_head.repeat_interleave(4, dim=1)

    logits = torch.einsum("bhd,bhtd->bht", query.double(), tokens(keys)) * 128**-0.5
    expected = torch.einsum("bht,bhtd->bhd", logits.softmax(-1), tokens(values))
    error = (result.double() - expected).norm() / expected.norm()
    assert float(error) < 1e-2  # the result is bf16: 2^-9 relative, and fp8 keys are exact in bf16
