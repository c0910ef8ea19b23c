"""The block that NOTES.md follows to a logit is decoded as it says there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import sphkv_kernels
from sphkv_codebooks.encoded import EncodedVectors
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.block_words import native_layout_of
from sphkv_kernels.lookup_tables import code_tables

NOTES = Path(sphkv_kernels.__file__).parents[1] / "NOTES.md"
WORD, UPPER, NORM = 0x5D27C11E, 0x9C, 8.0


def test_the_block_of_the_notes() -> None:
    code = SphericalCode.analytic("code", 64, (3, 2, 2, 2), "lloyd_max:2")
    layout = native_layout_of(code)
    assert layout is not None
    tables = code_tables(code, layout).shared
    rows = [WORD >> 8 * i & 255 for i in range(4)]
    quads, weights = tables[0][rows].astype(np.float64), tables[1][UPPER].astype(np.float64)
    key = (quads * weights[:, None]).ravel()

    def every_block(*codes: int) -> torch.Tensor:
        return torch.tensor([codes * 4], dtype=torch.uint8)

    level1 = [c for row in rows for c in (row & 7, row >> 3 & 7)]
    level2 = [row >> 6 for row in rows]
    stored = EncodedVectors(
        angle_codes=(
            every_block(*level1),
            every_block(*level2),
            every_block(UPPER & 3, UPPER >> 2 & 3),
            every_block(UPPER >> 4 & 3),
        ),
        radius_codes=every_block(UPPER >> 6),
        norms=torch.tensor([NORM], dtype=torch.float16),
    )
    expected = code.decode(stored, torch.float64)[0, :16].numpy()
    assert np.abs(NORM * key - expected).max() <= 2**-10 * np.abs(expected).max()
    text = NOTES.read_text()
    for numbers in (level1, level2, quads[1], weights, key[4:8], [key.sum(), NORM * key.sum()]):
        shown = ", ".join(f"{x:.4g}" for x in numbers)
        assert shown in text, shown
