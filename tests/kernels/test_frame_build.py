"""The kernels that take a step's vectors into the frame, built on a machine without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sphkv_kernels.build import compile_cubin
from sphkv_kernels.framing import frame_source
from tests.kernels.sass import disassemble, disassembler

pytest.importorskip("cuda.core", reason="cuda-core (extra `cuda`) is not installed")


@pytest.mark.skipif(
    disassembler("nvdisasm") is None,
    reason="the nvidia-cuda-nvdisasm wheel (extra `test`) is not installed",
)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("head_dim", "n_rows"), [(64, 4), (128, 1), (128, 8), (256, 2)])
def test_a_matrix_is_held_in_registers(
    head_dim: int, n_rows: int, capability: int, tmp_path: Path
) -> None:
    cubin = tmp_path / "frame.cubin"
    cubin.write_bytes(compile_cubin(frame_source(head_dim, n_rows), capability, folder=tmp_path))
    lines = disassemble(cubin)
    assert sum("EXIT" in line for line in lines) >= 2
    assert not any("LDL" in line or "STL" in line for line in lines)
    # A column of the matrix is asked for before the first vector is there to be shared.
    body = lines[next(i for i, line in enumerate(lines) if ".text.unframe_outputs:" in line) :]
    shared = next(i for i, line in enumerate(body) if re.search(r"\bSTS\b", line))
    assert sum("LDG" in line for line in body[:shared]) >= head_dim // 4
