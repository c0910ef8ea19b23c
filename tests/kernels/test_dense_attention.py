"""Which baseline a speed-up is over: the choice among measured ones (tests/gpu measures them)."""

from sphkv_kernels.dense_attention import Baseline, fastest, fp8_sentence
from sphkv_kernels.timing import Latency


def of(name: str, kv_format: str, median_us: float | None, reason: str = "") -> Baseline:
    latency = None if median_us is None else Latency(median_us, 0.0, 0.0, 1)
    return Baseline(name, kv_format, latency, reason)  # type: ignore[arg-type]


def test_the_fastest_of_a_format_that_ran() -> None:
    slow, fast = of("a", "bf16", 3.0), of("b", "bf16", 2.0)
    refused, coded = of("c", "bf16", None, "no kernel"), of("d", "fp8", 1.0)
    assert fastest((slow, refused, fast, coded), "bf16") is fast
    assert fastest((slow, refused, fast, coded), "fp8") is coded
    assert fastest((refused, coded), "bf16") is None


def test_a_report_says_why_it_has_no_fp8() -> None:
    dense = of("a", "bf16", 3.0)
    assert "not installed" in fp8_sentence((dense,))
    assert "nvcc is missing" in fp8_sentence((dense, of("b", "fp8", None, "nvcc is missing")))
    assert not fp8_sentence((dense, of("b", "fp8", 1.0))).startswith("No fp8")
