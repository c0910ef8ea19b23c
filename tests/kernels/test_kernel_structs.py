"""What the host writes into a launch is what the device code reads out of it."""

from __future__ import annotations

import ctypes
import re

import pytest

from sphkv_kernels import framing
from sphkv_kernels.encode_source import encode_params
from sphkv_kernels.kernel_structs import KernelParams
from sphkv_kernels.variant import CUDA_FOLDER

STRUCTS = {
    "params.cuh": {"Params": KernelParams},
    "encode.cuh": {"EncodeParams": encode_params(5)},
    "frame.cu": {"FrameParams": framing._FrameParams, "UnframeParams": framing._UnframeParams},
}
SIZES = {"int": 4, "float": 4, "u32": 4, "long long": 8}


@pytest.mark.parametrize(
    ("header", "name", "struct"),
    [(header, name, one) for header, found in STRUCTS.items() for name, one in found.items()],
)
def test_a_struct_has_the_same_fields_on_both_sides(
    header: str, name: str, struct: type[ctypes.Structure]
) -> None:
    text = re.sub(r"//.*", "", (CUDA_FOLDER / header).read_text())
    body = re.search(rf"struct {name} \{{(.*?)\n\}};", text, re.DOTALL)
    assert body is not None
    fields = []
    for statement in filter(None, map(str.strip, body[1].split(";"))):
        declared = re.fullmatch(r"((?:const )?(?:long long|\w+)\*?)\s+(.*)", statement)
        assert declared is not None
        for one in re.split(r",\s*", declared[2]):
            field = re.fullmatch(r"(\w+)(?:\[(\w+)\])?", one)
            assert field is not None
            size = 8 if "*" in declared[1] else SIZES[declared[1]]
            length = field[2] or "1"
            fields.append((field[1], size * (5 if length == "N_BOOK_FLOATS" else int(length))))
    mine = [(field[0], getattr(struct, field[0]).size) for field in struct._fields_]
    assert fields == mine
