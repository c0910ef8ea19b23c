"""Errors of codes are those of the plain definition, pair by pair, in float64."""

import math

import numpy as np
import pytest
import torch

from sphkv_cli.fit.captured_vectors import LayerChunk
from sphkv_cli.fit.code_measurement import LayerMeasurement, measure_layer
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode

N_TOKENS, N_KV_HEADS, GROUP, D = 23, 2, 3, 16
POSITIONS = torch.tensor([0, 5, 6, 17, 20])
SCALE = 0.3


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chunk_of(keys: torch.Tensor, first: int, stop: int) -> LayerChunk:
    return LayerChunk(
        first_token=first,
        keys=keys[first:stop],
        values=drawn(N_TOKENS, N_KV_HEADS, D, seed=2)[first:stop],
        queries=drawn(len(POSITIONS), N_KV_HEADS * GROUP, D, seed=3),
        query_positions=POSITIONS,
    )


@pytest.fixture
def keys() -> torch.Tensor:
    return drawn(N_TOKENS, N_KV_HEADS, D, seed=1) + 0.8


@pytest.fixture
def frames(keys: torch.Tensor) -> FrameSet:
    return FrameSet(Rotation("haar", D, 5), "post_rope", keys.mean(dim=0)[None].numpy())


CODES = (
    SphericalCode.analytic("block", D, (3, 2), "lloyd_max:2"),
    SphericalCode.analytic("full", D, (4, 2, 2, 2), "norm"),
)


def measure(chunks: list[LayerChunk], frames: FrameSet, window: int = 0) -> LayerMeasurement:
    shared = [[code] * N_KV_HEADS for code in CODES]
    return measure_layer(chunks, frames, 0, shared, shared, softmax_scale=SCALE, window=window)


@pytest.mark.parametrize("window", [0, 1, 4])
def test_errors_are_those_of_the_definition(
    keys: torch.Tensor, frames: FrameSet, window: int
) -> None:
    chunk = chunk_of(keys, 0, N_TOKENS)
    found = measure([chunk], frames, window)
    matrix = torch.from_numpy(frames.rotation.matrix())
    mean = torch.tensor(frames.key_mean[0], dtype=torch.float64)
    for index, code in enumerate(CODES):
        for head in range(N_KV_HEADS):
            raw = keys[:, head].double()
            framed = (raw - mean[head]) @ matrix.T
            error = framed - code.decode(code.encode(framed.float())).double()
            norms = [(x.square().sum(dim=1)) for x in (error, framed, raw)]
            assert found.key_distortion[index, head] == pytest.approx(
                float((norms[0] / norms[1]).mean()), rel=1e-4
            )
            assert found.raw_key_distortion[index, head] == pytest.approx(
                float((norms[0] / norms[2]).mean()), rel=1e-4
            )
            totals = np.zeros(4)
            n_pairs = 0
            for row, position in enumerate(POSITIONS.tolist()):
                for query_head in range(head * GROUP, (head + 1) * GROUP):
                    query = chunk.queries[row, query_head].double()
                    for t in range(N_TOKENS):
                        if t > position or (window and position - t >= window):
                            continue
                        n_pairs += 1
                        totals += [
                            float((matrix @ query) @ error[t]) ** 2,
                            float(query @ raw[t]) ** 2,
                            float(query @ (raw[t] - mean[head])) ** 2,
                            float(query @ query) * float(framed[t] @ framed[t]) / D,
                        ]
            assert found.n_pairs == n_pairs
            # float32 products of 16 terms.
            assert found.logit_error[index, head] == pytest.approx(SCALE**2 * totals[0], rel=1e-4)
            assert found.logit[head] == pytest.approx(SCALE**2 * totals[1], rel=1e-4)
            assert found.centred_logit[head] == pytest.approx(SCALE**2 * totals[2], rel=1e-4)
            assert found.isotropic_logit[head] == pytest.approx(SCALE**2 * totals[3], rel=1e-4)


def test_chunks_of_tokens_add_up(keys: torch.Tensor, frames: FrameSet) -> None:
    whole = measure([chunk_of(keys, 0, N_TOKENS)], frames)
    parts = measure([chunk_of(keys, 0, 1), chunk_of(keys, 1, 8), chunk_of(keys, 8, 23)], frames)
    for name in ("key_distortion", "value_distortion", "logit_error", "logit", "isotropic_logit"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-5)
    assert parts.n_pairs == whole.n_pairs


def test_keys_that_no_query_sees_do_not_count_in_logits(
    keys: torch.Tensor, frames: FrameSet
) -> None:
    poisoned = keys.clone()
    poisoned[POSITIONS.max() + 1 :] = 1000.0
    clean = measure([chunk_of(keys, 0, N_TOKENS)], frames)
    found = measure([chunk_of(poisoned, 0, N_TOKENS)], frames)
    assert (found.logit_error == clean.logit_error).all()
    assert (found.logit == clean.logit).all()


def test_each_head_may_have_its_own_code(keys: torch.Tensor, frames: FrameSet) -> None:
    chunk = chunk_of(keys, 0, N_TOKENS)
    coarse, fine = CODES[0], CODES[1]
    mixed = measure_layer(
        [chunk], frames, 0, [[coarse, fine]], [[fine, coarse]], softmax_scale=SCALE, window=0
    )
    pure = measure([chunk], frames)
    assert mixed.key_distortion[0] == pytest.approx(
        [pure.key_distortion[0, 0], pure.key_distortion[1, 1]], rel=1e-6
    )
    assert mixed.value_distortion[0] == pytest.approx(
        [pure.value_distortion[1, 0], pure.value_distortion[0, 1]], rel=1e-6
    )
    assert math.isclose(mixed.logit[0], pure.logit[0])
