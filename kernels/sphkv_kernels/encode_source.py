"""CUDA source of the encoder of one tier: its field layout as code, its books as numbers.

What fixes the instructions (head_dim, cells per level, where each field goes, rotation) is compiled
in; thresholds and centroids travel in the launch's parameters, so that other books of the same
format need no other kernel. The packing expressions come from `layout.NativeLayout`. Source: ours.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sphkv_codebooks.encoder import threshold_directions
from sphkv_codebooks.radius import LloydMaxRadius
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.block_words import decoded_layout_of, native_layout_of
from sphkv_kernels.kernel_structs import agreement
from sphkv_kernels.layout import Field, NativeLayout, unit_bytes
from sphkv_kernels.tier import RegionFormat, TierFormat

CUDA_FOLDER = Path(__file__).parent / "cuda"
SOURCES = ("intrinsics.cuh", "encode.cuh", "{formats}", "encode.cu")
N_THREADS = 256
_GAIN = {"none": 0, "least_squares": 1, "unbiased": 2}
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class EncoderSource:
    """CUDA text and the numbers of its books, in the order of the text's constants."""

    text: str
    books: Floats


def has_encoder(tier: TierFormat) -> bool:
    """Whether the CUDA encoder has the layouts of both regions."""
    return all(
        not isinstance(region, SphericalCode) or decoded_layout_of(region) is not None
        for region in (tier.key_format, tier.value_format)
    )


def encoder_source(
    tier: TierFormat, head_dim: int, *, hadamard: bool, single_rows: bool
) -> EncoderSource:
    """The encoder of a tier; single_rows: for tokens one by one instead of whole pages."""
    books = _Books()
    formats = [
        _format("KeyFormat", tier.key_format, head_dim, books),
        _format("ValueFormat", tier.value_format, head_dim, books),
    ]
    units = [_unit_bytes(region, head_dim) for region in (tier.key_format, tier.value_format)]
    codes = [r for r in (tier.key_format, tier.value_format) if isinstance(r, SphericalCode)]
    numbers = books.numbers()
    constants = {
        "HEAD_DIM": head_dim,
        "N_THREADS": N_THREADS,
        "HADAMARD": int(hadamard),
        "HADAMARD_SCALE": f"{float(np.float32(head_dim**-0.5)).hex()}f",
        "ROWS": int(single_rows),
        "LARGEST_UNIT": max(units),
        "HAS_GAIN": int(any(code.gain != "none" for code in codes)),
        "N_BOOK_FLOATS": numbers.size,
    }
    preamble = "\n".join(f"#define {name} {value}" for name, value in constants.items())
    texts = [
        "\n".join(["enum Kind { SPHERICAL, INT8, DENSE };", *formats])
        if source == "{formats}"
        else (CUDA_FOLDER / source).read_text()
        for source in SOURCES
    ]
    texts.append(agreement("EncodeParams", encode_params(numbers.size)))
    return EncoderSource("\n".join([preamble, *texts]), numbers)


@lru_cache(maxsize=64)
def encode_params(n_books: int) -> Any:
    """The struct of a launch whose books are so many numbers."""

    class EncodeParams(ctypes.Structure):
        """`EncodeParams` of encode.cuh."""

        _fields_ = (
            ("source", ctypes.c_void_p * 2),
            ("outer_stride", ctypes.c_longlong * 2),
            ("page_stride", ctypes.c_longlong * 2),
            ("row_stride", ctypes.c_longlong * 2),
            ("pages", ctypes.c_void_p),
            ("offsets", ctypes.c_void_p),
            ("rows", ctypes.c_void_p),
            ("refused", ctypes.c_void_p),
            ("n_vectors", ctypes.c_longlong),
            ("page_bytes", ctypes.c_longlong),
            ("pages_per_outer", ctypes.c_int),
            ("page_size", ctypes.c_int),
            ("type", ctypes.c_int),
            ("signs", ctypes.c_uint32 * 8),
            ("books", ctypes.c_float * n_books),
        )

    return EncodeParams


class _Books:
    """Float32 numbers one after the other."""

    def __init__(self) -> None:
        self._parts: list[Floats] = []
        self._size = 0

    def place(self, values: npt.ArrayLike) -> int:
        """Index of the first of `values`."""
        part = np.asarray(values, dtype=np.float32).ravel()
        first = self._size
        self._parts.append(part)
        self._size += part.size
        return first

    def numbers(self) -> Floats:
        return np.concatenate([*self._parts, np.zeros(1, np.float32)])


def _unit_bytes(region: RegionFormat, head_dim: int) -> int:
    if isinstance(region, SphericalCode):
        layout = native_layout_of(region)
        assert layout is not None
        return unit_bytes(layout, head_dim)
    return 16 * head_dim + 32 if region == "int8" else 32 * head_dim


def _format(name: str, region: RegionFormat, head_dim: int, books: _Books) -> str:
    """A C++ struct of constants and, for a code, its packing."""
    constants: dict[str, int] = {"UNIT_BYTES": _unit_bytes(region, head_dim)}
    body = ""
    if isinstance(region, SphericalCode):
        layout = native_layout_of(region)
        assert layout is not None
        constants |= _code_constants(region, layout, books)
        body = _packing(layout)
    kind = "SPHERICAL" if isinstance(region, SphericalCode) else region.upper()
    lines = [f"  static constexpr int {key} = {value};" for key, value in constants.items()]
    return "\n".join(
        [f"struct {name} {{", f"  static constexpr int KIND = {kind};", *lines, body, "};"]
    )


def _code_constants(code: SphericalCode, layout: NativeLayout, books: _Books) -> dict[str, int]:
    circle = threshold_directions(code.codebooks[0])
    width = circle.cos.shape[1]
    is_even = (
        width * 4 == circle.n_cells
        and bool((circle.cos == circle.cos[0]).all() and (circle.sin == circle.sin[0]).all())
        and float(circle.sin[0, 0]) == 0.0
    )
    constants = {
        "EVEN_QUADRANTS": int(is_even),
        "WIDTH_1": width,
        "COS_1": books.place(circle.cos),
        "SIN_1": books.place(circle.sin),
        "BEFORE_1": books.place(circle.passed_before),
        "GAIN": _GAIN[code.gain],
        "IS_MINIFLOAT": int(layout.radius == "minifloat"),
    }
    for level, book in enumerate(code.codebooks, start=1):
        constants[f"CELLS_{level}"] = book.n_cells
        if level > 1:
            directions = threshold_directions(book)
            constants[f"COS_{level}"] = books.place(directions.cos[0])
            constants[f"SIN_{level}"] = books.place(directions.sin[0])
        cosine, sine = book.cos_sin()
        constants[f"CENTROIDS_{level}"] = books.place([cosine, sine])
    coding = code.radius_coding
    constants["RADIUS_CELLS"] = 0
    if isinstance(coding, LloydMaxRadius):
        scale = code.n_radii**-0.5
        constants["RADIUS_CELLS"] = coding.centroids.size
        constants["RADIUS_THRESHOLDS"] = books.place(coding.thresholds * scale)
        constants["RADII"] = books.place(coding.centroids * scale)
    widths = [*(bits // 8 for bits in layout.plane_bits), 0, 0]
    constants |= {"WIDTH_A": widths[0], "WIDTH_B": widths[1], "WIDTH_C": widths[2]}
    return constants


def _packing(layout: NativeLayout) -> str:
    lines = ["  static __device__ void pack(u32 (&words)[3], const BlockCodes& b) {"]
    for plane in range(3):
        terms = [_field(layout, field) for field in layout.fields if field.plane == plane]
        lines.append(f"    words[{plane}] = {' | '.join(terms) or '0'};")
    return "\n".join([*lines, "  }"])


def _field(layout: NativeLayout, field: Field) -> str:
    bits = layout.level_bits[field.level - 1] if field.level else layout.radius_bits
    mask = (1 << field.width) - 1
    value = f"b.c{field.level}[{field.index}]" if field.level else "b.radius"
    if field.source_shift:
        value = f"({value} >> {field.source_shift})"
    if field.source_shift + field.width < bits:
        value = f"({value} & {mask}u)"
    if field.mirrored:
        value = f"({mask}u - {value})"
    return f"({value} << {field.shift})"
