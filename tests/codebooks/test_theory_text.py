"""THEORY.md names tests; each must exist, and each of its figures must be the computed one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from sphkv_codebooks.distortion import direction_bound, distortion_shares
from sphkv_codebooks.search import SearchSpace, best_code, gaussian_limit
from sphkv_codebooks.spherical_code import SphericalCode

HERE = Path(__file__).parent
TEXT = (HERE.parents[1] / "codebooks" / "THEORY.md").read_text(encoding="utf-8")


def test_every_named_test_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    written = set()
    for path in HERE.glob("test_*.py"):
        written |= set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M))
    assert len(named) > 20
    assert named <= written, named - written


def test_figures_in_the_text_are_the_computed_ones() -> None:
    paper = SphericalCode.analytic("paper", 128)
    full = SphericalCode.analytic("full", 128, (4, 2, 2, 2, 2, 3, 2), "norm")
    small = SphericalCode.analytic("small", 128, radius="lloyd_max:2")
    finer = SphericalCode.analytic("finer", 128, radius="lloyd_max:4")
    shares = [round(100 * part / paper.distortion()) for part in distortion_shares(paper).levels]
    assert "levels 1 to 4 contribute {}, {}, {}\nand {} %".format(*shares) in TEXT
    digits = {
        "D = {:.4f}": paper.distortion(),
        "{:.3f} ||k|| for 4/2/2/2": direction_bound(paper.codebooks),
        "{:.3f} ||k||\nfor the 3.125-bit": direction_bound(full.codebooks),
        "against {:.3f} and": paper.distortion() ** 0.5,
        "and {:.3f} expected": full.distortion() ** 0.5,
        "16 / 3.875 = {:.2f}": 16 / paper.code_rate,
        "({:.1f} times fewer than bf16)": 16 / small.code_rate,
        "4^-R, {:.4f} at": 4**-paper.code_rate,
    }
    for pattern, value in digits.items():
        # The text writes .179, Python 0.179.
        assert re.sub(r"\b0\.", ".", pattern.format(value)) in TEXT, pattern
    assert "for 9 % more D" in TEXT
    assert 100 * (small.distortion() / paper.distortion() - 1) == pytest.approx(9, abs=0.5)
    assert "4 bits 3.25 for .7 %" in TEXT
    assert 100 * (finer.distortion() / paper.distortion() - 1) == pytest.approx(0.7, abs=0.05)


def test_the_table_of_best_codes_is_the_computed_one() -> None:
    spaces = (
        SearchSpace(128, full_depth_radii=("norm",)),
        SearchSpace(128),
        SearchSpace(128, cells="powers_of_two"),
    )
    for rate in (2.0, 2.5, 3.0, 3.5, 4.0):
        norm, best, whole = (best_code(space, rate) for space in spaces)
        values = (gaussian_limit(rate), norm.distortion, best.distortion, whole.distortion)
        limit, *found = (f"{value:.4f}".removeprefix("0") for value in values)
        row = f"| {rate:g} | {limit} | {found[0]} | {found[1]} | {best.gap_db:.2f} | {found[2]} |"
        assert row in TEXT
        assert best.depth == 7
        # "About three times as many cells on level 1, nearly the same on the others."
        assert 2.4 < best.n_cells[0] / np.exp(np.log(best.n_cells[1:]).mean()) < 4.0
        assert 0.04 < 1.0 - best.distortion / whole.distortion < 0.16
