"""`profile --synthetic`: shapes, refusals, and what a made-up measurement looks like."""

import dataclasses
from pathlib import Path

import pytest
import torch

from sphkv_cli.artifacts.report import as_json
from sphkv_cli.errors import EnvironmentUnable, SphkvError, UsageError
from sphkv_cli.profile.roofline import roofline
from sphkv_cli.profile.synthetic import (
    SyntheticSpeed,
    SyntheticSpeedOptions,
    SyntheticSpeedReport,
    profile_synthetic,
)
from sphkv_cli.profile.synthetic_view import tables, view
from sphkv_kernels.benchmark import CaseReport, MetadataCase, Shape
from sphkv_kernels.timing import Latency

LATENCY = Latency(10.0, 9.0, 11.0, 50)


def case(n_tokens: int, n_bytes: int) -> CaseReport:
    shape = Shape(1, 2, n_tokens, 4)
    return CaseReport(
        shape=shape, tiers=("code",), page_size=32, bits_per_coordinate=4.0,
        bytes_read={"codes": n_bytes}, latency=LATENCY, code_gb_per_s=1.0,
        fraction_of_read_rate=0.5, fraction_of_copy_rate=0.6, best_bf16="sdpa cudnn",
        best_bf16_us=30.0, speed_up=3.0, best_fp8="flashinfer fp8", best_fp8_us=25.0,
        speed_up_over_fp8=2.5, reconstruct=None, output_error=1e-3,
        log_sum_exp_error=1e-4,
    )  # fmt: skip


def test_sweep_changes_one_number_at_a_time() -> None:
    shapes = SyntheticSpeedOptions("8x8x32768x4", sweep=True).shapes()
    base = shapes[0]
    assert base == Shape(8, 8, 32768, 4)
    assert len(set(shapes)) == len(shapes) > 8
    for shape in shapes[1:]:
        changed = [
            field.name
            for field in dataclasses.fields(Shape)
            if getattr(shape, field.name) != getattr(base, field.name)
        ]
        assert len(changed) == 1


@pytest.mark.parametrize(
    "shape", ["8x8x32768", "8x8x0x4", "axbxcxd", "8x8x64x17", "-1x8x64x4", "8x8x64x4x"]
)
def test_foreign_shapes_are_refused(shape: str) -> None:
    with pytest.raises(UsageError):
        SyntheticSpeedOptions(shape)


@pytest.mark.parametrize(
    ("shape", "head_dim"),
    [
        (f"1x1x{'9' * 5000}x1", 128),
        (f"1x1x64x{'9' * 5000}", 128),
        (f"{10**18}x1x64x1", 128),
        ("1000000x1000000x1000000x1", 64),
        ("1x8x536870913x1", 64),
    ],
)
def test_a_shape_that_no_gpu_holds_is_one_short_line(shape: str, head_dim: int) -> None:
    with pytest.raises(
        UsageError, match=r"more than any GPU holds.*give a smaller shape"
    ) as caught:
        SyntheticSpeedOptions(shape, head_dim)
    assert len(str(caught.value)) < 120


def test_the_largest_shape_and_leading_zeros_are_read() -> None:
    assert SyntheticSpeedOptions("1x8x536870912x1", 64).parsed().dense_bytes == 1 << 40
    assert SyntheticSpeedOptions(f"1x{'0' * 5000}8x64x1").parsed() == Shape(1, 8, 64, 1)


@pytest.mark.parametrize(
    ("sweep", "is_refused"),
    # The sweep goes to 8 sequences.
    [(False, False), (True, True)],
)
def test_a_shape_beyond_the_gpu_is_refused_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep: bool, is_refused: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 1 << 30))
    monkeypatch.setattr("sphkv_kernels.timing.memory_rates", lambda: 1 / 0)
    options = SyntheticSpeedOptions("1x8x262144x1", sweep=sweep)
    with pytest.raises(SphkvError if is_refused else ZeroDivisionError) as caught:
        profile_synthetic(options, tmp_path / "report.json")
    if is_refused:
        assert str(caught.value) == (
            "1x8x262144x1 does not fit into this GPU's memory; give a smaller shape"
        )
    assert not list(tmp_path.iterdir())


def test_a_code_that_the_kernel_does_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not read the code"):
        profile_synthetic(SyntheticSpeedOptions("1x1x64x1", codes=("4/2:fp16",)), tmp_path / "r")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnable, match="sees no GPU"):
        profile_synthetic(SyntheticSpeedOptions("1x1x64x1"), tmp_path / "report.json")
    assert not list(tmp_path.iterdir())


def test_roofline_points_lie_where_bytes_and_time_put_them() -> None:
    figure = roofline([case(1024, 1 << 20), case(4096, 1 << 22)], read_gb_per_s=3000.0)
    (panel,) = figure.panels
    series = {one.label: one for one in panel.series}  # type: ignore[union-attr]
    operations = 4.0 * 2 * 1024 * 4 * 128
    assert series["code"].x[0] == pytest.approx(operations / (1 << 20))
    assert series["code"].y[0] == pytest.approx(operations / 10e-6 / 1e12)
    # 16 bits per coordinate: two operations per byte of bf16 and query head.
    assert series["best bf16"].x[0] == pytest.approx(4.0)
    roof = series["read rate"]
    assert roof.y[0] / roof.x[0] == pytest.approx(3.0)


def test_view_and_report_hold_every_case() -> None:
    metadata = MetadataCase(
        "code", Shape(1, 2, 64, 4), 16, 4, "runs",
        {"codes": 1, "norms": 2, "plan": 3, "positions": 4}, LATENCY, LATENCY,
    )  # fmt: skip
    content = SyntheticSpeed({"gpu": "a GPU"}, 2.0, 3.0, (case(64, 1),), (metadata,), "No fp8.")
    blocks = view(SyntheticSpeedReport("report.json", "digest", content, 1.0))
    assert "1x2x64x4" in repr(blocks)
    assert "No fp8." in repr(blocks)
    assert "2.5" in repr(blocks)
    assert as_json(content)["cases"][0]["speed_up"] == 3.0
    speed, metadata_table = as_json(tables(content))
    assert speed["rows"][0][:2] == ["code", "1x2x64x4"]
    assert len(metadata_table["rows"]) == 1
