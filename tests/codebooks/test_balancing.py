"""Balancing makes keys and queries look alike and leaves logits alone; sinks are found by norm."""

import numpy as np
import pytest
import torch

from sphkv_codebooks.balancing import RIDGE, balancing_bytes, key_query_balancing
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotary import rotate, turning
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.sink_rule import SinkRule
from sphkv_codebooks.spherical_code import SphericalCode

N_HEADS, HEAD_DIM = 2, 32


def moments(seed: int, spread: float = 30.0) -> tuple[np.ndarray, np.ndarray]:
    """Two random second moments whose eigenvalues spread over `spread`."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(2):
        basis = np.linalg.qr(rng.standard_normal((N_HEADS, HEAD_DIM, HEAD_DIM)))[0]
        values = np.geomspace(1, spread, HEAD_DIM)
        found.append((basis * values) @ basis.swapaxes(-1, -2))
    return found[0], found[1]


def ridged(moment: np.ndarray) -> np.ndarray:
    level = np.trace(moment, axis1=1, axis2=2) / HEAD_DIM
    return moment + RIDGE * level[:, None, None] * np.eye(HEAD_DIM)


def test_both_sides_have_one_moment_up_to_scale() -> None:
    keys, queries = moments(0)
    A = key_query_balancing(keys, queries)
    assert (A.swapaxes(-1, -2) == A).all()
    assert (np.linalg.eigvalsh(A) > 0).all()
    inverse = np.linalg.inv(A)
    left = A @ ridged(keys) @ A
    right = inverse @ ridged(queries) @ inverse
    for head in range(N_HEADS):
        scale = np.trace(left[head]) / np.trace(right[head])
        # float16 rounds A by 2^-11; its condition of about 6 enters twice.
        assert np.abs(left[head] / scale - right[head]).max() < 0.02 * np.abs(right[head]).max()
    # Unbalanced the two are nothing alike.
    assert np.abs(keys[0] - queries[0]).max() > 0.3 * np.abs(queries[0]).max()


def test_logits_stay_and_the_error_of_a_code_falls() -> None:
    key_moment, query_moment = moments(1, spread=300.0)
    A = key_query_balancing(key_moment, query_moment)
    rotation = Rotation("haar", HEAD_DIM, 3)
    plain, balanced = FrameSet(rotation), FrameSet(rotation, balancing=A[None])
    rng = np.random.default_rng(2)

    def draw(moment: np.ndarray, n: int) -> torch.Tensor:
        root = np.linalg.cholesky(moment)
        normal = rng.standard_normal((n, N_HEADS, HEAD_DIM))
        return torch.from_numpy(np.einsum("hij,nhj->nhi", root, normal))

    keys, queries = draw(key_moment, 400), draw(query_moment, 100)
    exact = torch.einsum("qhd,thd->qht", queries, keys)
    code = SphericalCode.analytic("3 bit", HEAD_DIM, (4, 2, 2, 2), "lloyd_max:2")
    errors = {}
    for name, frames in (("plain", plain), ("balanced", balanced)):
        framed = frames.keys_to_frame(0, keys)
        inside = frames.queries_to_frame(0, queries)
        same = torch.einsum("qhd,thd->qht", inside, framed)
        torch.testing.assert_close(same, exact, rtol=1e-9, atol=1e-9)
        made = code.decode(code.encode(framed), torch.float64) - framed
        errors[name] = float(torch.einsum("qhd,thd->qht", inside, made).square().mean())
    assert errors["balanced"] < errors["plain"] / 1.5


def test_a_diagonal_balancing_does_not_care_how_far_pairs_are_turned() -> None:
    """One scale per RoPE pair commutes with R_t, so it holds at every position."""
    keys, queries = moments(2)
    A = key_query_balancing(keys, queries, diagonal=True)
    x = torch.randn(5, N_HEADS, HEAD_DIM, dtype=torch.float64)
    inv_freq = torch.logspace(0, -3, HEAD_DIM // 2, dtype=torch.float64)
    positions = torch.arange(100, 105)
    scales = torch.from_numpy(np.diagonal(A, axis1=1, axis2=2).copy())
    assert not (A * (1 - np.eye(HEAD_DIM))).any()
    torch.testing.assert_close(
        rotate(scales * x, positions, inv_freq), scales * rotate(x, positions, inv_freq)
    )


def test_bytes_count_a_triangle_a_diagonal_or_nothing() -> None:
    keys, queries = moments(3)
    full = key_query_balancing(keys, queries)
    diagonal = key_query_balancing(keys, queries, diagonal=True)
    identity = np.broadcast_to(np.eye(HEAD_DIM), full.shape)
    assert balancing_bytes(full) == N_HEADS * HEAD_DIM * (HEAD_DIM + 1)
    assert balancing_bytes(diagonal) == N_HEADS * 2 * HEAD_DIM
    assert balancing_bytes(identity) == 0
    assert (full.astype(np.float16).astype(np.float64) == full).all()


def test_singular_moments_stay_well_conditioned_and_empty_ones_are_refused() -> None:
    rank_one = np.zeros((1, HEAD_DIM, HEAD_DIM))
    rank_one[0, 0, 0] = 1.0
    A = key_query_balancing(rank_one, np.eye(HEAD_DIM)[None])
    assert np.linalg.cond(A)[0] < (1 + HEAD_DIM / RIDGE) ** 0.5
    with pytest.raises(CodeError, match="key moment"):
        key_query_balancing(np.zeros_like(rank_one), rank_one)
    with pytest.raises(CodeError, match="query moment"):
        key_query_balancing(rank_one, rank_one * np.nan)


def test_turning_tells_standing_pairs_from_turning_ones() -> None:
    inv_freq = np.array([0.0, 1e-7, 2 * np.pi / 1000, 0.37], dtype=np.float32)
    found = turning(inv_freq, 1000)
    t = np.arange(1000)
    expected = 1 - np.abs(np.exp(1j * np.outer(inv_freq.astype(np.float64), t)).mean(axis=1)) ** 2
    assert found == pytest.approx(expected, abs=1e-9)
    assert found[0] == 0 and found[2] > 0.999999


def test_sinks_are_keys_below_their_heads_threshold() -> None:
    rule = SinkRule(np.array([[1.0, 10.0], [1.0, 1.0]]), 0.5)
    keys = torch.zeros(3, 2, 4)
    keys[:, :, 0] = torch.tensor([[0.4, 6.0], [0.6, 4.0], [0.5, 5.0]])
    assert rule.finds(0, keys).tolist() == [[True, False], [False, True], [False, False]]
    with pytest.raises(CodeError, match="sink factor is 1"):
        SinkRule(np.ones((1, 1)), 1.0)
    with pytest.raises(CodeError, match="finite norms"):
        SinkRule(np.full((1, 1), np.nan), 0.5)
