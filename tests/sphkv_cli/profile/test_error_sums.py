"""Laws of the running statistics."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from sphkv_cli.profile.error_sums import MagnitudeSums


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 3000),
    log_scale=st.floats(-40, 40),
    fraction=st.sampled_from((0.5, 0.9, 0.99, 1.0)),
)
def test_percentile_is_right_to_one_bin(
    seed: int, n: int, log_scale: float, fraction: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator, dtype=torch.float64) * 2.0**log_scale
    sums = MagnitudeSums(2)
    sums.add(1, x[: n // 2])
    sums.add(1, x[n // 2 :])
    ranked = x.abs().sort().values
    true = float(ranked[math.ceil(fraction * n) - 1])
    found = float(sums.percentile(fraction)[1])
    # The edge above a bin of width 2^-6 of its power of two; float32 rounding may shift a bin.
    assert true * (1 - 1e-6) <= found <= true * (1 + 2**-6 + 1e-6)
    assert found <= float(sums.maximum()[1])
    assert math.isclose(float(sums.rms()[1]), float(x.square().mean().sqrt()), rel_tol=1e-12)
    assert math.isnan(float(sums.percentile(fraction)[0]))
    assert math.isnan(float(sums.maximum()[0]))


def test_zeros_count() -> None:
    sums = MagnitudeSums(1)
    sums.add(0, torch.zeros(99))
    sums.add(0, torch.ones(1))
    assert float(sums.percentile(0.99)[0]) < 1e-30
    assert float(sums.percentile(1.0)[0]) == 1.0
