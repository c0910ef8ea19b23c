"""The sweep of bits: its arithmetic, and that too few level-1 bits show as such."""

from pathlib import Path

import pytest

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.capture.options import SyntheticOptions
from sphkv_cli.capture.synthetic import capture_synthetic
from sphkv_cli.errors import UsageError
from sphkv_cli.study.bits_per_level import RADII, run, swept_codes
from sphkv_cli.study.inputs import StudyInputs, StudyOptions


def test_a_bit_of_a_level_costs_its_angles_alone() -> None:
    swept = swept_codes(64)
    (base,) = {s.code.code_rate for s in swept if s.is_base}
    for s in swept:
        if s.part == RADII:
            expected = (s.bits - 2) / 16
        else:
            level = int(s.part.split()[1])
            expected = (s.bits - (4 if level == 1 else 2)) / 2**level
        assert s.code.code_rate - base == pytest.approx(expected)


def test_more_bits_never_raise_the_predicted_distortion_and_shares_fall() -> None:
    parts: dict[str, list[tuple[float, float]]] = {}
    for s in swept_codes(64):
        parts.setdefault(s.part, []).append((s.code.distortion(), s.share))
    assert len(parts) == 5
    for points in parts.values():
        for values in zip(*points, strict=True):
            assert list(values) == sorted(values, reverse=True)


def test_one_level_1_bit_too_few_is_visibly_worse(tmp_path: Path) -> None:
    options = SyntheticOptions(n_layers=1, n_q_heads=1, n_kv_heads=1, head_dim=32, n_documents=3)
    capture_synthetic(options, tmp_path / "capture.h5")
    with CaptureReader(tmp_path / "capture.h5") as capture:
        result = run(StudyInputs(StudyOptions(max_queries=32), capture))
    table = result.tables[0]
    place = {name: index for index, name in enumerate(table.columns)}
    error = {
        (row[place["part"]], row[place["bits"]]): float(str(row[place["output error"]]))
        for row in table.rows
    }
    assert error["level 1", "3"] > 1.3 * error["level 1", "4 (base)"]
    assert error["level 1", "3"] > error["level 2", "1"] > error["level 2", "2 (base)"]
    assert "not measured" in " ".join(result.conditions)


def test_a_head_without_two_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match="head_dim 16"):
        swept_codes(16)
