"""The ranking error is that of attention itself, computed here the long way."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.errors import SphkvError
from sphkv_cli.evaluation.protocol import UniformProtocol
from sphkv_cli.fit.attention_error import CodePair, attention_errors
from sphkv_cli.progress import NullProgress
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode

PROTOCOL = UniformProtocol(window=8, first_tokens=4, first_scored=20)
FRAMES = FrameSet(Rotation("haar", 32, 3))
KEYS = SphericalCode.analytic("keys", 32, (4, 2, 2))
VALUES = SphericalCode.analytic("values", 32, (3, 2), "lloyd_max:2")
PAIRS: tuple[CodePair, ...] = ((KEYS, None), (None, VALUES), (KEYS, VALUES), (None, None))


def short_sinks(
    rng: np.random.Generator, kind: str, document: int, layer: int, shape: tuple[int, ...]
) -> np.ndarray:
    x = rng.standard_normal(shape)
    if kind == "keys":
        x[10::25] *= 0.2
    return x


def attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    logits = keys @ query
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum() @ values)


def sink_norms(reader: CaptureReader) -> np.ndarray:
    """Half the median norm of each head, (n_layers, n_kv_heads)."""
    document = reader.documents_of("fit")[0]
    norms = [np.linalg.norm(reader.keys(document, x), axis=-1) for x in range(reader.n_layers)]
    return 0.5 * np.median(norms, axis=1)


def long_way(
    reader: CaptureReader, pair: CodePair, norms: np.ndarray, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of squared output errors and outputs, (n_layers, n_q_heads), a query at a time."""
    shape = (reader.n_layers, reader.n_q_heads)
    error, output = np.zeros(shape), np.zeros(shape)
    for document in reader.documents_of("select"):
        for layer in range(reader.n_layers):
            k = torch.from_numpy(reader.keys(document, layer)).double()
            v = torch.from_numpy(reader.values(document, layer)).double()
            q = torch.from_numpy(reader.queries(document, layer)).double().numpy()
            scale = reader.layers[layer].softmax_scale
            coded_k, coded_v = k.clone(), v.clone()
            if pair[0] is not None:
                code = pair[0]
                framed = FRAMES.rotation.apply(k.float())
                coded_k = FRAMES.rotation.apply_inverse(code.decode(code.encode(framed))).double()
                sinks = k.norm(dim=-1) < torch.from_numpy(norms[layer])
                coded_k[sinks] = k[sinks]
            if pair[1] is not None:
                code = pair[1]
                framed = FRAMES.rotation.apply(v.float())
                coded_v = FRAMES.rotation.apply_inverse(code.decode(code.encode(framed))).double()
            for row, position in enumerate(reader.query_positions(document).tolist()):
                if position < PROTOCOL.first_scored:
                    continue
                first = max(0, position - window + 1) if window else 0
                seen = range(first, position + 1)
                for head in range(reader.n_q_heads):
                    kv_head = head // (reader.n_q_heads // reader.n_kv_heads)

                    far = [position - j > 8 and j >= 4 for j in seen]
                    keys, values = [
                        torch.where(
                            torch.tensor(far)[:, None],
                            c[first : position + 1, kv_head],
                            x[first : position + 1, kv_head],
                        ).numpy()
                        for c, x in ((coded_k, k), (coded_v, v))
                    ]
                    query = scale * q[row, head]
                    exact = attend(
                        query,
                        k[first : position + 1, kv_head].numpy(),
                        v[first : position + 1, kv_head].numpy(),
                    )
                    error[layer, head] += np.sum((attend(query, keys, values) - exact) ** 2)
                    output[layer, head] += np.sum(exact**2)
    return error, output


@pytest.mark.parametrize("window", [0, 30])
def test_equals_attention_computed_a_query_at_a_time(
    make_capture: Callable[..., Path], window: int
) -> None:
    path = make_capture(draw=short_sinks, n_tokens=60, query_stride=5, window=window)
    with CaptureReader(path) as reader:
        norms = sink_norms(reader)
        found = attention_errors(reader, FRAMES, PAIRS, PROTOCOL, norms, NullProgress())
        for index, pair in enumerate(PAIRS):
            error, output = long_way(reader, pair, norms, window)
            # float32 against float64: errors of 1e-7 of the outputs, squared.
            assert found.error[index] == pytest.approx(error, rel=1e-4, abs=1e-9)
            assert found.output == pytest.approx(output, rel=1e-5)
    assert (found.error[3] == 0.0).all()
    assert found.logit_rms(1) == 0.0
    assert found.logit_rms(0) == found.logit_rms(2) > 0.0


def test_dense_sinks_spare_logits(make_capture: Callable[..., Path]) -> None:
    path = make_capture(draw=short_sinks, n_tokens=80)
    with CaptureReader(path) as reader:
        args = (reader, FRAMES, PAIRS[:1], PROTOCOL)
        spared = attention_errors(*args, sink_norms(reader), NullProgress())
        coded = attention_errors(*args, None, NullProgress())
    assert spared.logit_error.sum() < coded.logit_error.sum()
    assert spared.dense_share == pytest.approx(3 / 80, abs=0.02)
    assert coded.dense_share == 0.0


def test_documents_too_short_to_read_anything_coded_are_refused(
    make_capture: Callable[..., Path],
) -> None:
    reader = CaptureReader(make_capture(n_tokens=20))
    with reader, pytest.raises(SphkvError, match="no `select` document"):
        attention_errors(reader, FRAMES, PAIRS, PROTOCOL, None, NullProgress())
