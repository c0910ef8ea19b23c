"""The format as a whole: rates, descriptions that rebuild it bit for bit, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.histogram_lloyd import lloyd_max_samples
from sphkv_codebooks.polar import to_polar
from sphkv_codebooks.spherical_code import SphericalCode


def test_paper_code_is_a_point_of_the_family() -> None:
    """62 bits a block of 16, 3.875 per coordinate: 4.13 times fewer than bf16's 16."""
    code = SphericalCode.analytic("paper-4222", 128)
    assert code.n_cells == (16, 4, 4, 4)
    assert code.bits_per_vector / code.n_radii == 62
    assert code.code_rate == 3.875
    assert 16 / code.code_rate == pytest.approx(4.13, abs=0.005)
    # A whole bit per coordinate goes into float16 radii.
    assert code.n_radii * 16 / code.head_dim == 1.0


@given(st.integers(1, 8), st.integers(1, 8))
def test_angles_and_radii_are_as_many_as_coordinates(log_dim: int, depth: int) -> None:
    depth = min(depth, log_dim)
    code = SphericalCode.analytic("n", 1 << log_dim, (1,) * depth)
    assert sum(code.n_angles) + code.n_radii == code.head_dim
    assert code.n_angles == tuple((1 << log_dim) >> level for level in range(1, depth + 1))


@pytest.mark.parametrize(
    ("bits", "radius", "bits_per_block"),
    [
        ((4, 2, 2, 2), "fp16", 62),
        ((3, 1, 1, 1), "lloyd_max:1", 32),
        ((3, 2, 2, 2), "lloyd_max:2", 40),
        ((4, 2, 2, 2), "lloyd_max:2", 48),
        ((4, 3, 3, 3), "lloyd_max:3", 56),
        ((5, 3, 3, 3), "lloyd_max:3", 64),
        ((4, 3, 3, 3), "minifloat:5,6", 64),
    ],
)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rate_counts_codes_radii_and_norm(
    bits: tuple[int, ...], radius: str, bits_per_block: int, head_dim: int
) -> None:
    code = SphericalCode.analytic("tier", head_dim, bits, radius)
    norm_bits = 16 if radius.startswith("lloyd_max") else 0
    assert code.bits_per_vector == bits_per_block * (head_dim // 16) + norm_bits
    assert code.code_rate == code.bits_per_vector / head_dim


def test_cells_that_are_no_power_of_two_count_their_logarithm() -> None:
    code = SphericalCode.analytic("n", 64, n_cells=(12, 3, 1), radius="fp16")
    expected = 32 * np.log2(12) + 16 * np.log2(3) + 8 * 0 + 8 * 16
    assert code.bits_per_vector == pytest.approx(expected, rel=1e-14)


def various() -> list[SphericalCode]:
    sample = torch.randn(400, 64, generator=torch.Generator().manual_seed(1))
    base = SphericalCode.analytic("empirical-base", 64, (4, 2, 2), "lloyd_max:2")
    books = [
        lloyd_max_samples(angles.numpy(), level, 5)
        for level, angles in enumerate(to_polar(sample * torch.arange(64), 3).angles, start=1)
    ]
    return [
        SphericalCode.analytic("paper", 64),
        SphericalCode.analytic("full", 64, (4, 2, 2, 2, 2, 3), "norm", gain="unbiased"),
        SphericalCode.analytic("mini", 64, n_cells=(9, 5), radius="minifloat:4,5", pairing="rope"),
        base.with_codebooks("empirical", books),
    ]


@pytest.mark.parametrize("code", various(), ids=lambda c: c.name)
def test_description_rebuilds_the_code_bit_for_bit(code: SphericalCode) -> None:
    again = SphericalCode.from_description(json.loads(json.dumps(code.describe())))
    assert again.digest == code.digest
    assert again.codebooks == code.codebooks
    assert again.describe() == code.describe()
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(2))
    first, second = code.encode(x), again.encode(x)
    for left, right in zip(first.angle_codes, second.angle_codes, strict=True):
        assert torch.equal(left, right)
    assert torch.equal(code.decode(first), again.decode(second))


def test_digest_is_of_the_format_not_of_its_name() -> None:
    paper = SphericalCode.analytic("paper", 64)
    assert SphericalCode.analytic("other name", 64).digest == paper.digest
    different = [
        SphericalCode.analytic("paper", 128),
        SphericalCode.analytic("paper", 64, (4, 2, 2, 3)),
        SphericalCode.analytic("paper", 64, pairing="rope"),
        SphericalCode.analytic("paper", 64, gain="least_squares"),
        SphericalCode.analytic("paper", 64, radius="lloyd_max:2"),
        SphericalCode.analytic("paper", 64, radius="lloyd_max:3"),
    ]
    assert len({code.digest for code in [paper, *different]}) == 7


def damaged(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    description = SphericalCode.analytic("paper", 64, radius="lloyd_max:1").describe()
    change(description)
    return description


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(description_version=2), "newer than 1.*update sphkv"),
        (lambda d: d.pop("levels"), "not a spherical code description.*levels"),
        (lambda d: d.update(head_dim="many"), "not a spherical code description"),
        (lambda d: d.update(head_dim=96), "power of two"),
        (lambda d: d.update(depth=3), "depth 3 needs as many codebooks"),
        (lambda d: d.update(pairing="diagonal"), "'adjacent' or 'rope'"),
        (lambda d: d.update(gain="loud"), "gain must be one of"),
        (lambda d: d["levels"].reverse(), "level 1 wants"),
        (lambda d: d["levels"][1]["centroids_rad"].pop(), "needs 2 thresholds"),
        (lambda d: d["levels"][0].update(thresholds_rad=[float("nan")] * 16), "NaN"),
        (lambda d: d["radius"].update(spec="lloyd_max:2"), "2-bit radius book"),
        (lambda d: d.update(radius={"spec": "fp9"}), "'fp9' is unknown"),
    ],
)
def test_damaged_descriptions_are_refused_in_words(
    change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(CodeError, match=message):
        SphericalCode.from_description(damaged(change))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((96,), {}, "power of two"),
        ((8,), {}, "depth 4 is out of range: head_dim 8 allows 1 to 3"),
        ((64, ()), {}, "depth 0 is out of range"),
        ((64, (4, 2, 9)), {}, "level 3 may have 0 to 8 bits, not 9"),
        ((64, (-1,)), {}, "level 1 may have 0 to 8 bits, not -1"),
        ((64,), {"n_cells": (16, 0)}, "1 to 256 cells, not 0"),
        ((64,), {"n_cells": (300,)}, "not 300"),
        ((64,), {"radius": "norm"}, "'norm' needs full depth.*leaves 4 radii"),
        ((16,), {"radius": "lloyd_max:2"}, "at full depth the radius is the norm"),
        ((64, (1, 2)), {"gain": "unbiased"}, "2 cells on level 1 can make zero"),
        ((64,), {"gain": "loud"}, "gain must be one of"),
    ],
)
def test_codes_out_of_range_are_refused(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CodeError, match=message):
        SphericalCode.analytic("bad", *arguments, **options)


@given(st.integers(0, 1000), st.integers(1, 6), st.sampled_from(["none", "least_squares"]))
@settings(max_examples=30, deadline=None)
def test_decoding_a_code_and_coding_it_again_changes_nothing(
    seed: int, depth: int, gain: str
) -> None:
    """Centroids lie inside their cells, so a decoded vector has the codes it came from."""
    code = SphericalCode.analytic("idem", 64, (4, 2, 2, 2, 2, 3)[:depth], "fp16", gain=gain)  # type: ignore[arg-type]
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(seed))
    first = code.encode(x)
    second = code.encode(code.decode(first))
    for left, right in zip(first.angle_codes, second.angle_codes, strict=True):
        assert torch.equal(left, right)
