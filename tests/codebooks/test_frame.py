"""The frame leaves every logit and every output what it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation, RotationKind

N_LAYERS, N_KV_HEADS, HEAD_DIM = 3, 2, 16


def frames(kind: RotationKind, is_centred: bool, is_balanced: bool, seed: int = 0) -> FrameSet:
    rng = np.random.default_rng(seed)
    shape = (N_LAYERS, N_KV_HEADS, HEAD_DIM)
    mean = rng.standard_normal(shape).astype(np.float32) * 5
    balancing = rng.standard_normal((*shape, HEAD_DIM)) + 6 * np.eye(HEAD_DIM)
    return FrameSet(
        Rotation(kind, HEAD_DIM, seed),
        "post_rope" if is_centred else "none",
        mean if is_centred else None,
        balancing if is_balanced else None,
    )


@given(
    st.sampled_from(["haar", "hadamard", "none"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 3, 8]),
    st.integers(0, 1000),
    st.integers(0, N_LAYERS - 1),
)
@settings(max_examples=60, deadline=None)
def test_logits_and_outputs_are_unchanged(
    kind: RotationKind,
    is_centred: bool,
    is_balanced: bool,
    group_size: int,
    seed: int,
    layer: int,
) -> None:
    """q . k = q' . k' + q . c per query head, and S^T (p S v) = p v."""
    frame = frames(kind, is_centred, is_balanced, seed)
    generator = torch.Generator().manual_seed(seed)
    n_q_heads = group_size * N_KV_HEADS
    keys, values = torch.randn(2, 7, N_KV_HEADS, HEAD_DIM, dtype=torch.float64, generator=generator)
    queries = torch.randn(5, n_q_heads, HEAD_DIM, dtype=torch.float64, generator=generator)

    def logits(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.einsum("qhd,thd->qht", q, k.repeat_interleave(group_size, dim=1))

    framed = logits(frame.queries_to_frame(layer, queries), frame.keys_to_frame(layer, keys))
    framed = framed + frame.logit_offset(layer, queries)[..., None]
    torch.testing.assert_close(framed, logits(queries, keys), rtol=1e-9, atol=1e-9)
    weights = torch.rand(7, 1, 1, dtype=torch.float64, generator=generator)
    output = frame.output_from_frame((weights * frame.values_to_frame(values)).sum(0))
    torch.testing.assert_close(output, (weights * values).sum(0), rtol=1e-10, atol=1e-10)
    back = frame.keys_from_frame(layer, frame.keys_to_frame(layer, keys))
    torch.testing.assert_close(back, keys, rtol=1e-9, atol=1e-9)


def test_query_heads_read_their_own_kv_head() -> None:
    """Head h reads KV head h // group_size: with means 1 and 2 the offsets tell them apart."""
    mean = np.zeros((1, 2, HEAD_DIM), dtype=np.float32)
    mean[0, 0, 0], mean[0, 1, 0] = 1.0, 2.0
    frame = FrameSet(Rotation("none", HEAD_DIM), "post_rope", mean)
    queries = torch.zeros(1, 6, HEAD_DIM)
    queries[..., 0] = 1.0
    assert frame.logit_offset(0, queries).tolist() == [[1, 1, 1, 2, 2, 2]]


def test_centring_removes_the_mean_and_dtype_stays() -> None:
    frame = frames("hadamard", True, False)
    assert frame.key_mean is not None
    keys = torch.from_numpy(frame.key_mean[1].copy()).expand(4, -1, -1)
    framed = frame.keys_to_frame(1, keys)
    assert framed.dtype == torch.float32
    assert (framed == 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FrameSet(Rotation("haar", 16), "pre_rope"), "not available yet"),
        (lambda: FrameSet(Rotation("haar", 16), "sometimes"), "centring must be one of"),
        (lambda: FrameSet(Rotation("haar", 16), "post_rope"), "post_rope needs key means"),
        (lambda: FrameSet(Rotation("haar", 16), "none", np.zeros((1, 1, 16))), "none has none"),
        (lambda: FrameSet(Rotation("haar", 16), "post_rope", np.zeros((1, 16))), "n_kv_heads, 16"),
        (
            lambda: FrameSet(Rotation("haar", 16), "post_rope", np.full((1, 1, 16), np.nan)),
            "finite",
        ),
        (
            lambda: FrameSet(Rotation("haar", 16), balancing=np.zeros((1, 1, 16, 16))),
            "condition below",
        ),
        (lambda: FrameSet(Rotation("haar", 16), balancing=np.eye(16)), "balancing must be"),
        (lambda: frames("haar", True, False).keys_to_frame(9, torch.zeros(1, 2, 16)), "layer 9"),
        (
            lambda: frames("haar", True, False).keys_to_frame(0, torch.zeros(1, 3, 16)),
            r"n_kv_heads, head_dim\) = \(2, 16\)",
        ),
        (
            lambda: frames("haar", True, False).logit_offset(0, torch.zeros(1, 5, 16)),
            "5 query heads cannot share 2",
        ),
    ],
)
def test_bad_frames_are_refused_in_words(make: object, message: str) -> None:
    with pytest.raises(CodeError, match=message):
        make()  # type: ignore[operator]
