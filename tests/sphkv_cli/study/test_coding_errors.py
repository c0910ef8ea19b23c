"""Errors of codings against a loop in float64; per-head codings against the plain one."""

import numpy as np
import pytest
import torch

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.errors import SphkvError
from sphkv_cli.evaluation.coding import DenseCoding, ModelCacheShape
from sphkv_cli.evaluation.frame_coding import FrameCoding
from sphkv_cli.evaluation.protocol import UniformProtocol
from sphkv_cli.study.calibration import block_code, calibrated_codes, mean_frames
from sphkv_cli.study.coding_errors import coding_errors
from sphkv_cli.study.head_coding import AnalyticBooks, FittedBooks, HeadCoding, OnlineBooks
from sphkv_cli.study.prompt_protocol import PromptProtocol
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.tier import TierFormat


def shape_of(capture: CaptureReader) -> ModelCacheShape:
    return ModelCacheShape(capture.n_layers, capture.n_kv_heads, capture.head_dim)


def code_of(capture: CaptureReader) -> SphericalCode:
    return block_code(capture.head_dim, (4, 2, 2, 2), "lloyd_max:2")


def rotated(capture: CaptureReader, source: str = "analytic") -> HeadCoding:
    code, fit = code_of(capture), capture.documents_of("fit")
    frames = mean_frames(capture, fit, Rotation("hadamard", capture.head_dim, 3))
    books = {
        "analytic": lambda: AnalyticBooks(code),
        "offline": lambda: FittedBooks(
            [calibrated_codes(capture, fit, frames, code, n) for n in range(capture.n_layers)]
        ),
        "online": lambda: OnlineBooks(code),
    }[source]()
    return HeadCoding(source, code, books, frames, shape_of(capture))


@pytest.mark.parametrize("protocol", [UniformProtocol(20, 3, 40), PromptProtocol(96, 3)])
def test_errors_are_those_of_a_loop(tiny_capture: CaptureReader, protocol: object) -> None:
    assert isinstance(protocol, UniformProtocol | PromptProtocol)
    capture, layer, coding = tiny_capture, 1, rotated(tiny_capture)
    document = capture.documents_of("judge")[0]
    (found,) = coding_errors(capture, [document], [layer], [coding], protocol, max_queries=7)

    keys, values, queries = (
        torch.from_numpy(read(document, layer)).double()
        for read in (capture.keys, capture.values, capture.queries)
    )
    positions = capture.query_positions(document)
    usable = [row for row, at in enumerate(positions) if at >= protocol.scored(160).start]
    usable = usable[:: -(-len(usable) // 7)]
    span = protocol.coded_span(160, 1)
    coded = coding.code(layer, keys[:span].float(), values[:span].float(), torch.arange(span))
    scale = capture.layers[layer].softmax_scale
    error, norm, logit2, n_logits = np.zeros(4), np.zeros(4), 0.0, 0
    for row in usable:
        at = int(positions[row])
        for head in range(4):
            q, kv = queries[row, head], head // 2
            k, v = keys[: at + 1, kv].clone(), values[: at + 1, kv].clone()
            exact = torch.softmax(scale * (k @ q), 0) @ v
            for token in range(at + 1):
                if isinstance(protocol, UniformProtocol):
                    is_coded = at - token > 20 and token >= 3
                else:
                    is_coded = 3 <= token < 96 <= at
                if is_coded:
                    logit2 += float(scale * (coded.keys[token, kv].double() - k[token]) @ q) ** 2
                    n_logits += 1
                    k[token], v[token] = coded.keys[token, kv], coded.values[token, kv]
            output = torch.softmax(scale * (k @ q), 0) @ v
            error[head] += float((output - exact).square().sum())
            norm[head] += float(exact.square().sum())
    assert found.relative_output[0] == pytest.approx(error / norm, rel=1e-3)
    assert found.logit_rms == pytest.approx((logit2 / n_logits) ** 0.5, rel=1e-4)
    difference = coded.keys.double() - keys[:span]
    centred = keys[:span] - keys.mean(0)
    ratio = difference.square().sum(-1) / centred.square().sum(-1)
    assert found.key_distortion == pytest.approx(float(ratio.mean()), rel=1e-4)


def test_what_is_dense_has_no_error(tiny_capture: CaptureReader) -> None:
    dense = DenseCoding(shape_of(tiny_capture))
    documents = tiny_capture.documents_of("judge")
    (found,) = coding_errors(
        tiny_capture, documents, [0, 1], [dense], PromptProtocol(96), max_queries=16
    )
    assert found.key_distortion == found.value_distortion == found.logit_rms == 0.0
    assert found.worst_head < 1e-5  # the two softmaxes add in another order


def test_documents_without_queries_to_judge_are_refused(tiny_capture: CaptureReader) -> None:
    with pytest.raises(SphkvError, match="no captured query"):
        coding_errors(
            tiny_capture,
            tiny_capture.documents_of("judge"),
            [0],
            [DenseCoding(shape_of(tiny_capture))],
            PromptProtocol(160),
            max_queries=4,
        )


def test_analytic_books_per_head_are_the_plain_coding(tiny_capture: CaptureReader) -> None:
    by_head = rotated(tiny_capture)
    code = by_head.code_format
    plain = FrameCoding(TierFormat.spherical(code, code), by_head.frames, by_head.shape)
    keys = torch.from_numpy(tiny_capture.keys(0, 1))
    values = torch.from_numpy(tiny_capture.values(0, 1))
    found, expected = (
        coding.code(1, keys, values, torch.arange(len(keys))) for coding in (by_head, plain)
    )
    assert torch.equal(found.keys, expected.keys)
    assert torch.equal(found.values, expected.values)
    for quantity in ("code_rate", "stored_bytes"):
        assert getattr(by_head, quantity)(100) == getattr(plain, quantity)(100)
    assert by_head.table_bytes() == plain.table_bytes()


def test_books_per_head_are_paid_for(tiny_capture: CaptureReader) -> None:
    analytic, online = rotated(tiny_capture), rotated(tiny_capture, "online")
    # 2 layers x 2 heads x keys and values instead of one set, 4 bytes a centroid.
    extra = (2 * 2 * 2 - 1) * 4 * sum(analytic.code_format.n_cells)
    assert online.table_bytes() - analytic.table_bytes() == extra


def test_every_layer_is_coded_with_its_own_books(tiny_capture: CaptureReader) -> None:
    offline = rotated(tiny_capture, "offline")
    values = torch.from_numpy(tiny_capture.values(0, 0))
    first, second = (offline.code(n, values, values, torch.arange(160)).values for n in (0, 1))
    assert not torch.equal(first, second)


def test_books_fitted_to_a_prompt_code_it_no_worse(tiny_capture: CaptureReader) -> None:
    keys = torch.from_numpy(tiny_capture.keys(4, 0))
    values = torch.from_numpy(tiny_capture.values(4, 0))
    distortion = {}
    for source in ("analytic", "offline", "online"):
        coded = rotated(tiny_capture, source).code(0, keys, values, torch.arange(len(keys)))
        distortion[source] = float((coded.values - values).square().sum())
    # The books minimise angle error, the radii share what is left: half a percent of room.
    assert distortion["online"] <= 1.005 * distortion["analytic"]
    assert distortion["online"] <= distortion["offline"]


def test_the_first_tokens_of_calibration_make_the_mean(tiny_capture: CaptureReader) -> None:
    documents = tiny_capture.documents_of("fit")
    frames = mean_frames(tiny_capture, documents, Rotation("none", 32), max_tokens=200)
    keys = np.concatenate([tiny_capture.keys(d, 1) for d in documents])[:200]
    assert frames.key_mean is not None and frames.centring == "post_rope"
    assert frames.key_mean[1] == pytest.approx(keys.mean(0, dtype=np.float64), abs=1e-6)
