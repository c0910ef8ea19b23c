"""The frame leaves every logit and every output what it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotary import keep_strongest_pairs, kept_pairs, rotate
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


def turned(
    n_pairs: int, seed: int = 0, is_balanced: bool = False, has_residual: bool = False
) -> FrameSet:
    """Layer 0 centred before RoPE, layer 1 after, layer 2 not."""
    rng = np.random.default_rng(seed)
    mean = 5 * rng.standard_normal((N_LAYERS, N_KV_HEADS, HEAD_DIM)).astype(np.float32)
    mean[0] = keep_strongest_pairs(mean[0], n_pairs)
    mean[2] = 0
    inv_freq = 1e4 ** -np.linspace(0, 1, HEAD_DIM // 2)
    balancing = rng.standard_normal((*mean.shape, HEAD_DIM)) + 6 * np.eye(HEAD_DIM)
    residual = np.zeros_like(mean)
    residual[0] = rng.standard_normal(mean.shape[1:])
    return FrameSet(
        Rotation("haar", HEAD_DIM, seed),
        ("pre_rope", "post_rope", "none"),
        mean,
        balancing if is_balanced else None,
        np.tile(inv_freq, (N_LAYERS, 1)).astype(np.float32),
        residual if has_residual else None,
    )


def all_logits(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(n_queries, n_q_heads, n_tokens)."""
    return torch.einsum("qhd,thd->qht", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1))


def term(
    frame: FrameSet, layer: int, queries: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """q . c_t from the coefficients, (n_queries, n_q_heads, n_tokens); 0 where there are none."""
    found = frame.position_coefficients(layer, queries)
    if found is None:
        return torch.zeros(*queries.shape[:2], len(positions), dtype=queries.dtype)
    coefficients, frequencies = found
    group_size = queries.shape[1] // frequencies.shape[0]
    angles = frequencies.double().repeat_interleave(group_size, dim=0)[..., None] * positions
    return (
        coefficients[..., 0, :, None] * angles.cos() + coefficients[..., 1, :, None] * angles.sin()
    ).sum(dim=2)


@given(
    st.integers(1, HEAD_DIM // 2),
    st.booleans(),
    st.sampled_from([1, 4]),
    st.integers(0, 100),
    st.integers(0, N_LAYERS - 1),
)
@settings(max_examples=40, deadline=None)
def test_any_number_of_pairs_leaves_logits_exact_at_any_positions(
    n_pairs: int, is_balanced: bool, group_size: int, seed: int, layer: int
) -> None:
    """q . k_t = q' . k' + offset + position term, whatever is truncated from the mean."""
    frame = turned(n_pairs, seed, is_balanced, has_residual=seed % 2 == 1)
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 100_000, (9,), generator=generator)
    keys = torch.randn(9, N_KV_HEADS, HEAD_DIM, dtype=torch.float64, generator=generator)
    queries = torch.randn(
        5, group_size * N_KV_HEADS, HEAD_DIM, dtype=torch.float64, generator=generator
    )
    framed = frame.keys_to_frame(layer, keys, positions)
    logits = all_logits(frame.queries_to_frame(layer, queries), framed)
    logits = logits + frame.logit_offset(layer, queries)[..., None]
    logits = logits + term(frame, layer, queries, positions)
    torch.testing.assert_close(logits, all_logits(queries, keys), rtol=1e-10, atol=1e-10)
    back = frame.keys_from_frame(layer, framed, positions)
    torch.testing.assert_close(back, keys, rtol=1e-10, atol=1e-10)
    assert frame.rope_pairs(layer) == (n_pairs if layer == 0 else 0)


def test_wrong_uses_of_a_turned_mean_break_the_logits() -> None:
    """No term, positions off by one, and only some keys centred: each far from the logits."""
    frame = turned(3)
    generator = torch.Generator().manual_seed(1)
    positions = torch.arange(64)
    keys = torch.randn(64, N_KV_HEADS, HEAD_DIM, dtype=torch.float64, generator=generator)
    queries = torch.randn(3, N_KV_HEADS, HEAD_DIM, dtype=torch.float64, generator=generator)
    exact = all_logits(queries, keys)
    inside = frame.queries_to_frame(0, queries)
    framed = frame.keys_to_frame(0, keys, positions)
    right = all_logits(inside, framed) + term(frame, 0, queries, positions)
    some = torch.where((positions < 32)[:, None, None], framed, frame.rotation.apply(keys))
    wrong = {
        "no term": all_logits(inside, framed),
        "positions off by one": all_logits(inside, framed) + term(frame, 0, queries, positions + 1),
        "half of the keys centred": all_logits(inside, some) + term(frame, 0, queries, positions),
    }
    assert float((right - exact).abs().max()) < 1e-12
    for name, logits in wrong.items():
        # As large as the logits themselves, not a rounding.
        assert float((logits - exact).square().mean().sqrt()) > 1.0, name


def test_a_turned_mean_is_removed_and_a_truncated_one_keeps_its_strongest_pairs() -> None:
    frame = turned(2)
    assert frame.key_mean is not None and frame.inv_freq is not None
    positions = torch.tensor([0, 1, 7, 5000])
    mean = torch.from_numpy(frame.key_mean[0].copy())[None]
    keys = rotate(mean, positions, torch.from_numpy(frame.inv_freq[0].copy()))
    assert frame.keys_to_frame(0, keys, positions).abs().max() < 1e-5
    # R_t keeps lengths, and is the identity at 0.
    torch.testing.assert_close(keys[0], mean[0])
    torch.testing.assert_close(keys.norm(dim=-1), mean.norm(dim=-1).expand(4, -1))
    full = np.array([[3.0, 1.0, 0.0, 0.1, 4.0, 1.0, 0.5, 0.0]], dtype=np.float32)
    assert keep_strongest_pairs(full, 2).tolist() == [[3, 1, 0, 0, 4, 1, 0, 0]]
    assert kept_pairs(full).tolist() == [4]


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
        (lambda: FrameSet(Rotation("haar", 16), "pre_rope"), "pre_rope need key means"),
        (lambda: FrameSet(Rotation("haar", 16), "pre_rope", np.ones((1, 1, 16))), "needs inv_freq"),
        (
            lambda: FrameSet(Rotation("haar", 16), ("none", "post_rope"), np.ones((1, 1, 16))),
            "2 centrings and key means of 1 layers",
        ),
        (
            lambda: FrameSet(Rotation("haar", 16), ("none", "post_rope"), np.ones((2, 1, 16))),
            "layer 0 is not centred, its key_mean must be 0",
        ),
        (
            lambda: FrameSet(
                Rotation("haar", 16),
                "pre_rope",
                np.ones((1, 1, 16)),
                inv_freq=np.ones((1, 4), dtype=np.float32),
            ),
            "every RoPE pair of every layer",
        ),
        (
            lambda: replace(turned(4), residual_mean=np.ones((3, 2, 16))),
            "layer 1 is not pre_rope, its residual_mean must be 0",
        ),
        (lambda: replace(turned(4), residual_mean=np.ones((3, 1, 16))), "as key_mean"),
        (lambda: turned(4).keys_to_frame(0, torch.zeros(3, 2, 16)), "need the position"),
        (
            lambda: turned(4).keys_to_frame(0, torch.zeros(3, 2, 16), torch.arange(4)),
            r"got \(4,\)",
        ),
        (lambda: FrameSet(Rotation("haar", 16), "sometimes"), "centring must be one of"),
        (lambda: FrameSet(Rotation("haar", 16), "post_rope"), "pre_rope need key means"),
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
