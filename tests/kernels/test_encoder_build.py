"""The encoder's source and build, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sphkv_codebooks.encoder import threshold_directions
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.build import compile_cubin
from sphkv_kernels.encode_source import encoder_source, has_encoder
from sphkv_kernels.tier import TierFormat
from tests.kernels.cases import NATIVE_CODES, even_code, native_tiers
from tests.kernels.sass import disassemble, disassembler, registers_of

pytest.importorskip("cuda.core", reason="cuda-core (extra `cuda`) is not installed")
needs_tools = pytest.mark.skipif(
    disassembler("nvdisasm") is None or disassembler("cuobjdump") is None,
    reason="the nvidia-cuda-nvdisasm and -cuobjdump wheels (extra `test`) are not installed",
)


@needs_tools
@pytest.mark.parametrize(
    ("tier", "head_dim", "single_rows"), [(0, 128, False), (4, 256, False), (9, 64, True)]
)
def test_encoder_keeps_everything_in_few_registers(
    tier: int, head_dim: int, single_rows: bool, tmp_path: Path
) -> None:
    one = native_tiers(head_dim)[tier]
    source = encoder_source(one, head_dim, hadamard=True, single_rows=single_rows)
    cubin = tmp_path / "encode.cubin"
    cubin.write_bytes(compile_cubin(source.text, 90, folder=tmp_path))
    lines = disassemble(cubin)
    assert not any("LDL" in line or "STL" in line for line in lines)
    assert registers_of(cubin) <= 64  # 1024 threads of a multiprocessor read at once


def test_other_books_of_a_format_need_no_other_kernel() -> None:
    bits, radius = NATIVE_CODES[0]
    analytic = SphericalCode.analytic("a", 128, bits, radius)
    even = even_code(128, analytic.n_cells, radius)
    one, other = (
        encoder_source(TierFormat.spherical(code), 128, hadamard=False, single_rows=False)
        for code in (analytic, even)
    )
    assert one.text == other.text
    assert not np.array_equal(one.books, other.books)


def test_books_hold_the_very_numbers_that_the_cpu_compares_with() -> None:
    code = SphericalCode.analytic("a", 128, (4, 3, 3, 3), "lloyd_max:3")
    source = encoder_source(TierFormat.spherical(code), 128, hadamard=False, single_rows=False)
    for book in code.codebooks:
        directions = threshold_directions(book)
        for numbers in (directions.cos.ravel(), directions.sin.ravel()):
            windows = np.lib.stride_tricks.sliding_window_view(source.books, numbers.size)
            assert bool((windows == numbers).all(axis=1).any())


def test_codes_without_a_native_layout_have_no_encoder() -> None:
    assert not has_encoder(TierFormat.spherical(even_code(128, (16, 4), "fp16")))
    assert not has_encoder(TierFormat.spherical(even_code(128, (16, 4, 4, 4), "fp16", "rope")))
    assert all(has_encoder(tier) for tier in native_tiers(128))
