"""Measured output errors against attention written out in full, and against the first order."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sphkv_cli.allocation.agreement import log_correlation
from sphkv_cli.allocation.context import LayerContext, read_context, split_document
from sphkv_cli.allocation.output_error import HorizonAttention
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.codebooks import CodebooksReader
from sphkv_cli.errors import UsageError


@pytest.fixture(scope="module")
def context(chain) -> LayerContext:
    books = CodebooksReader.open(chain.codebooks)
    with CaptureReader(chain.capture) as capture:
        document = capture.documents[0]
        split = split_document(capture, document, horizon=48, window=32)
        weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
        return read_context(capture, document, 1, split, books.frames, weights)


def by_hand(context: LayerContext, keys, values, dropped) -> list[float]:
    """Attention of the horizon in the frame, one query and head at a time, in float64."""
    n, found = context.n_context, [0.0, 0.0]
    rows = range(*context.split.horizon_rows.indices(len(context.positions)))
    every_key = torch.cat([keys, context.keys_framed[n:]]).double()
    every_value = torch.cat([values, context.values_framed[n:]]).double()
    for row in rows:
        stop = int(context.positions[row]) + 1
        for head in range(4):
            kv = head // 2
            q = context.queries_framed[row, head].double()
            exact = context.keys_framed[:stop, kv].double() @ q * context.geometry.softmax_scale
            o = torch.softmax(exact, 0) @ context.values_framed[:stop, kv].double()
            coded = every_key[:stop, kv] @ q * context.geometry.softmax_scale
            coded[:n][dropped[:, kv]] = -torch.inf
            o_hat = torch.softmax(coded, 0) @ every_value[:stop, kv]
            weight = float(context.head_weights[head])
            found[kv] += weight * float(((o_hat - o) ** 2).sum()) / len(rows)
    return found


def test_output_error_is_attention_written_out(context: LayerContext) -> None:
    rng = torch.Generator().manual_seed(0)
    n = context.n_context
    keys = context.keys_framed[:n] + 0.1 * torch.randn(n, 2, 32, generator=rng)
    values = context.values_framed[:n] + 0.1 * torch.randn(n, 2, 32, generator=rng)
    dropped = torch.rand(n, 2, generator=rng) < 0.2
    keys[dropped] = 1e4  # nobody may read what is not there
    found = HorizonAttention.of(context).output_error(keys, values, dropped)
    # float32 logits against float64 ones.
    assert found.tolist() == pytest.approx(by_hand(context, keys, values, dropped), rel=1e-3)


def test_exact_vectors_make_no_error(context: LayerContext) -> None:
    n = context.n_context
    found = HorizonAttention.of(context).output_error(
        context.keys_framed[:n], context.values_framed[:n]
    )
    assert torch.all(found < 1e-10)


def test_small_errors_cost_what_the_utilities_say(context: LayerContext) -> None:
    rng = torch.Generator().manual_seed(1)
    n, utility = context.n_context, context.horizon_utility
    noise = 0.02 * torch.randn(2, n, 2, 32, generator=rng)
    exact = context.keys_framed[:n], context.values_framed[:n]
    size = (noise.double() ** 2).sum(-1).transpose(1, 2)
    for found, predicted in (
        (
            HorizonAttention.of(context).output_error(exact[0] + noise[0], exact[1]),
            utility.key * size[0],
        ),
        (
            HorizonAttention.of(context).output_error(exact[0], exact[1] + noise[1]),
            utility.value * size[1],
        ),
    ):
        # One draw of noise over 145 tokens, of which a few carry most.
        assert found.tolist() == pytest.approx(predicted.sum(-1).tolist(), rel=0.5)


def test_dropping_one_token_costs_its_utility(context: LayerContext) -> None:
    n = context.n_context
    token = int(context.horizon_utility.drop[0].argmax())
    dropped = torch.zeros(n, 2, dtype=torch.bool)
    dropped[token, 0] = True
    exact = context.keys_framed[:n], context.values_framed[:n]
    found = HorizonAttention.of(context).output_error(*exact, dropped)
    assert float(found[0]) == pytest.approx(float(context.horizon_utility.drop[0, token]), rel=1e-3)
    assert float(found[1]) < 1e-10


def test_a_document_without_room_is_refused(chain) -> None:
    path: Path = chain.capture
    with CaptureReader(path) as capture:
        document = capture.documents[0]
        for options, words in (
            ({"horizon": 150, "window": 64}, r"193 tokens; horizon 150 and window 64 need 214"),
            ({"horizon": 193, "window": 1}, "need 194"),
        ):
            with pytest.raises(UsageError, match=words):
                split_document(capture, document, **options)
        split = split_document(capture, document, horizon=48, window=32)
        positions = capture.query_positions(document)
        assert positions[split.window_rows].tolist() == list(range(113, 145))
        assert positions[split.horizon_rows].tolist() == list(range(145, 193))


def test_log_correlation_ignores_what_has_no_logarithm() -> None:
    x = torch.tensor([1.0, 10.0, 100.0, 0.0]).numpy()
    assert log_correlation(x, x**2) == pytest.approx(1.0)
    assert log_correlation(x, 1 / (x + 1e-30)) == pytest.approx(-1.0)
    assert log_correlation(x[:2], x[:2]) != log_correlation(x[:2], x[:2])  # NaN: too few


def test_a_soft_cap_and_a_sliding_window_are_respected(context: LayerContext) -> None:
    n = context.n_context
    exact = context.keys_framed[:n], context.values_framed[:n]
    cap = replace(context, geometry=replace(context.geometry, logit_softcap=0.5))
    assert bool((HorizonAttention.of(cap).output_error(*exact) < 1e-10).all())
    far = torch.zeros(n, 2, dtype=torch.bool)
    far[: n - 8] = True
    window = replace(context, geometry=replace(context.geometry, window=9))
    # The first query after the context sees its last eight tokens: the others may go.
    assert bool((HorizonAttention.of(window).output_error(*exact, far) < 1e-10).all())
    assert bool((HorizonAttention.of(context).output_error(*exact, far) > 1e-3).all())
    far[n - 8] = True
    assert bool((HorizonAttention.of(window).output_error(*exact, far) > 1e-10).all())
    noisy = exact[0] + 0.05, exact[1]
    plain = HorizonAttention.of(context).output_error(*noisy)
    assert bool((HorizonAttention.of(cap).output_error(*noisy) != plain).all())
