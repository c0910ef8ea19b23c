"""A step's vectors into the frame and out of it, against float64 products of the same matrices."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from sphkv_kernels.frame_tensors import FramedQueries, FrameTensors
from sphkv_kernels.framing import frame_tokens, unframe_outputs
from sphkv_kernels.framing_reference import frame_tokens_reference, unframe_outputs_reference
from sphkv_kernels.tier import PageError
from tests.gpu.cases import needs_cuda

pytestmark = [pytest.mark.gpu, needs_cuda]

CAPACITY = 40
# Sums of at most 256 products in float32.
RELATIVE = 2e-6
BFLOAT16 = 2.0**-8


def gaussian(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).cuda()


def frame_of(
    d: int, n_q: int, n_kv: int, *, balanced: bool, n_pairs: int, full: bool
) -> FrameTensors:
    frame = FrameTensors(
        query=gaussian(n_q if balanced else 1, d, d, seed=1),
        key=gaussian(n_kv if balanced else 1, d, d, seed=2),
        value=gaussian(d, d, seed=3),
        output=gaussian(d, d, seed=4),
        n_q_heads=n_q,
        n_kv_heads=n_kv,
        position=gaussian(n_q, d, 2, n_pairs, seed=5) if n_pairs else None,
        frequencies=gaussian(n_kv, n_pairs, seed=11) if n_pairs else None,
    )
    if not full:
        return frame
    return replace(
        frame,
        centre=gaussian(n_kv, d, seed=6),
        mean=gaussian(n_kv, d, seed=7),
        turned=gaussian(n_kv, d, seed=8),
        offset=gaussian(n_q, d, seed=9),
    )


def widened(frame: FrameTensors) -> FrameTensors:
    tensors = {one.name: getattr(frame, one.name) for one in fields(frame)}
    wide = {
        name: x.double()
        for name, x in tensors.items()
        if isinstance(x, Tensor) and name != "frequencies"
    }
    return replace(frame, **wide)


def coefficients_of(found: FramedQueries) -> Tensor | None:
    return None if found.term is None else found.term.coefficients


def assert_near(found: Tensor, expected: Tensor, relative: float) -> None:
    assert torch.isfinite(found).all()
    assert float((found.double() - expected).abs().max()) <= relative * float(expected.abs().max())


@pytest.mark.parametrize("n", [1, 2, 5, 33])
@pytest.mark.parametrize(
    ("d", "n_q", "n_kv", "balanced", "n_pairs", "full", "dtype"),
    [
        (128, 8, 2, False, 0, False, torch.bfloat16),
        (64, 9, 3, True, 8, True, torch.bfloat16),
        (128, 4, 4, True, 64, True, torch.float16),
        (256, 4, 1, False, 5, True, torch.float32),
        (256, 3, 3, True, 0, False, torch.bfloat16),
    ],
)
def test_tokens_enter_the_frame(
    n: int,
    d: int,
    n_q: int,
    n_kv: int,
    balanced: bool,
    n_pairs: int,
    full: bool,
    dtype: torch.dtype,
) -> None:
    frame = frame_of(d, n_q, n_kv, balanced=balanced, n_pairs=n_pairs, full=full)
    # As a model's projection leaves them: heads of all three beside each other.
    joined = gaussian(n, n_q + 2 * n_kv, d + 8, seed=10 + n).to(dtype)[..., :d]
    query, key, value = joined.split([n_q, n_kv, n_kv], dim=1)
    turns = (gaussian(n, 1, d, seed=20), gaussian(n, 1, d, seed=21)) if full else None
    tail = torch.full((2, n, n_kv, CAPACITY, d), torch.nan, dtype=torch.bfloat16, device="cuda")
    rows = torch.arange(2 * n * n_kv, device="cuda") * CAPACITY + 17
    found = frame_tokens(frame, query, key, value, tail=tail, rows=rows, turns=turns)

    wide_turns = None if turns is None else (turns[0].double(), turns[1].double())
    wide_tail = tail.new_full(tail.shape, torch.nan)
    expected = frame_tokens_reference(
        widened(frame), query, key, value, tail=wide_tail, rows=rows, turns=wide_turns
    )
    assert_near(found.query, expected.query, RELATIVE)
    for one, other in (
        (found.offset, expected.offset),
        (coefficients_of(found), coefficients_of(expected)),
    ):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert_near(one, other, RELATIVE)
    assert (found.offset is not None) == full and (found.term is not None) == (n_pairs > 0)
    for new, other in zip(tail[:, :, :, 17], wide_tail[:, :, :, 17], strict=True):
        assert_near(new, other.double(), BFLOAT16)
    assert int(tail.isfinite().sum()) == 2 * n * n_kv * d

    if full:
        without = frame_tokens(
            frame, query, key, value, tail=tail, rows=rows, turns=turns, with_offset=False
        )
        assert without.offset is None and torch.equal(without.query, found.query)


@pytest.mark.parametrize("n", [1, 4, 70])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_leave_the_frame(n: int, d: int, dtype: torch.dtype) -> None:
    frame = frame_of(d, 6, 2, balanced=False, n_pairs=0, full=False)
    outputs = gaussian(n, 6, d, seed=n)
    found = unframe_outputs(frame, outputs, dtype)
    assert found.dtype == dtype and found.shape == outputs.shape
    expected = unframe_outputs_reference(widened(frame), outputs.double(), torch.float64)
    rounding = {torch.float32: RELATIVE, torch.bfloat16: BFLOAT16, torch.float16: 2.0**-11}
    assert_near(found, expected, rounding[dtype])


def test_what_does_not_fit_is_refused() -> None:
    frame = frame_of(64, 4, 2, balanced=False, n_pairs=0, full=True)
    query, keys = gaussian(3, 4, 64, seed=1), gaussian(3, 2, 64, seed=2)
    turns = (gaussian(3, 1, 64, seed=3), gaussian(3, 1, 64, seed=4))
    tail = torch.zeros((2, 3, 2, 8, 64), dtype=torch.bfloat16, device="cuda")
    rows = torch.zeros(12, dtype=torch.int64, device="cuda")
    with pytest.raises(PageError, match="turns"):
        frame_tokens(frame, query, keys, keys, tail=tail, rows=rows)
    for bad in (
        {"rows": rows[:-1]},
        {"tail": tail.float()},
        {"key": keys[:, :1]},
        {"value": keys.half()},
        {"query": query[..., :32]},
        {"query": gaussian(3, 64, 4, seed=5).transpose(1, 2)},
    ):
        given = {"query": query, "key": keys, "value": keys, "tail": tail, "rows": rows} | bad
        with pytest.raises(PageError, match=next(iter(bad))):
            frame_tokens(frame, turns=turns, **given)
    with pytest.raises(PageError, match="outputs"):
        unframe_outputs(frame, query.half(), torch.float16)
    with pytest.raises(PageError, match=r"frame\.position"):
        replace(frame, position=torch.zeros(3, 64, 2, 1, device="cuda"))
    with pytest.raises(PageError, match="its matrix and its frequencies"):
        replace(frame, position=torch.zeros(4, 64, 2, 1, device="cuda"))
    with pytest.raises(PageError, match="both of its parts"):
        replace(frame, turned=None)
