"""Profile on a GPU: the kernel reads the plan's pages, its error is small, times are there."""

from pathlib import Path

import numpy as np
import pytest

from sphkv_cli.allocation.options import AllocateOptions
from sphkv_cli.allocation.stage import allocate
from sphkv_cli.capture.options import SyntheticOptions
from sphkv_cli.capture.synthetic import capture_synthetic
from sphkv_cli.fit.options import FitOptions
from sphkv_cli.fit.stage import fit_codebooks
from sphkv_cli.profile.options import ProfileOptions
from sphkv_cli.profile.stage import profile
from sphkv_cli.profile.synthetic import SyntheticSpeedOptions, profile_synthetic
from sphkv_cli.profile.synthetic_view import view as synthetic_view
from sphkv_cli.profile.view import view
from tests.gpu.cases import OUTPUT_TOLERANCE, needs_cuda

pytestmark = [pytest.mark.gpu, needs_cuda]


def test_profile_runs_the_kernel_on_the_plans_pages(tmp_path: Path) -> None:
    capture, codebooks, allocation = (tmp_path / f"{n}.h5" for n in ("capture", "books", "plan"))
    capture_synthetic(SyntheticOptions(document_tokens=130, query_tail=66), capture)
    codes = ("3/2/2/2:r2", "4/2/2/2:fp16")
    fit_codebooks(FitOptions(codes=codes, page_sizes=(16,)), capture, codebooks)
    options = AllocateOptions(budget="4b", page_size=16, horizon=33, window=32)
    allocate(options, capture, codebooks, allocation)
    report = profile(ProfileOptions(backend="cuda"), capture, allocation, tmp_path / "report.json")
    content = report.content
    assert not content.accuracy_only
    for candidate in content.candidates:
        assert candidate.recursion is None
        assert candidate.kernel is not None
        assert float(candidate.kernel.output_error.max()) <= OUTPUT_TOLERANCE
        assert bool(np.isfinite(candidate.kernel.logit_max).all())
    assert content.speed is not None
    assert {(row.batch, row.n_context // 4096) for row in content.speed.rows} == {
        (batch, blocks) for batch in (1, 8) for blocks in (1, 7)
    }
    for row in content.speed.rows:
        assert 0 < row.step_p20_us <= row.step_us <= row.step_p80_us
        assert 0 < row.fraction_of_read < 1
        assert 0.5 * row.step_us < row.without_term_us < 1.2 * row.step_us
    shown = repr(view(report))
    assert "speed-up" in shown
    assert ("Centring before RoPE" in shown) == (content.speed.n_layers_with_term > 0)


def test_synthetic_profile_times_every_code_and_draws_a_roofline(tmp_path: Path) -> None:
    options = SyntheticSpeedOptions("2x2x1024x4", codes=("4/2/2/2:fp16", "3/2/2/2:r2"), sweep=True)
    plot = tmp_path / "roofline.png"
    report = profile_synthetic(options, tmp_path / "speed.json", plot=plot)
    content = report.content
    assert len(content.cases) == 2 * len(options.shapes())
    for case in content.cases:
        assert case.output_error <= OUTPUT_TOLERANCE
        assert case.latency.p20_us <= case.latency.median_us <= case.latency.p80_us
        assert 0 < case.fraction_of_read_rate < 1.2  # small caches may lie in L2
    assert [case.reconstruct is not None for case in content.cases[:3]] == [True, True, False]
    assert {case.page_size for case in content.metadata} == {16, 32, 64}
    assert plot.stat().st_size > 1000
    assert "position term" in repr(synthetic_view(report))
