"""The masked attention against a loop over queries, tokens and heads in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sphkv_cli.evaluation import masked_attention
from sphkv_cli.evaluation.coding import CodedTokens, DenseCoding, ModelCacheShape
from sphkv_cli.evaluation.masked_attention import CodedRun
from sphkv_cli.evaluation.protocol import ReadProtocol, RetentionProtocol, UniformProtocol
from sphkv_cli.models.geometry import AttentionLayer, ModelGeometry

N_TOKENS, N_Q_HEADS, N_KV_HEADS, HEAD_DIM = 37, 4, 2, 8


class Noisy(DenseCoding):
    """Something else than what was written, with tokens dropped."""

    def __init__(self, shape: ModelCacheShape, dropped: Tensor) -> None:
        super().__init__(shape)
        object.__setattr__(self, "dropped", dropped)

    def code(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> CodedTokens:
        kept = ~self.dropped[: len(keys)]  # type: ignore[attr-defined]
        return CodedTokens(keys + 1, 2 * values, kept)


def brute_force(
    q: Tensor, k: Tensor, v: Tensor, protocol: ReadProtocol, coding: Noisy, window: int, cap: float
) -> Tensor:
    out = torch.zeros_like(q)
    for head in range(N_Q_HEADS):
        kv = head * N_KV_HEADS // N_Q_HEADS
        for i in range(N_TOKENS):
            logits, read = [], []
            for j in range(i + 1):
                if window and i - j >= window:
                    continue
                is_coded = bool(protocol.reads_coded(torch.tensor([i]), torch.tensor([j])))
                if is_coded and bool(coding.dropped[j, kv]):  # type: ignore[attr-defined]
                    continue
                key = (k[0, kv, j].float() + 1).double() if is_coded else k[0, kv, j]
                logit = float(q[0, head, i] @ key) * 0.3
                logits.append(cap * math.tanh(logit / cap) if cap else logit)
                read.append(2 * v[0, kv, j].float().double() if is_coded else v[0, kv, j])
            p = torch.softmax(torch.tensor(logits, dtype=torch.float64), dim=0)
            out[0, head, i] = p @ torch.stack(read)
    return out


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("window", [0, 13])
@pytest.mark.parametrize(
    "protocol", [UniformProtocol(7, 3), UniformProtocol(0, 0), RetentionProtocol(23)]
)
def test_every_query_reads_what_the_protocol_says(
    monkeypatch: pytest.MonkeyPatch, protocol: ReadProtocol, window: int, softcap: float
) -> None:
    monkeypatch.setattr(masked_attention, "QUERY_BLOCK", 16)
    generator = torch.Generator().manual_seed(1)

    def draw(n_heads: int) -> Tensor:
        shape = (1, n_heads, N_TOKENS, HEAD_DIM)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(N_Q_HEADS), draw(N_KV_HEADS), draw(N_KV_HEADS)
    dropped = torch.rand(N_TOKENS, N_KV_HEADS, generator=generator) < 0.3
    shape = ModelCacheShape(1, N_KV_HEADS, HEAD_DIM)
    coding = Noisy(shape, dropped)
    layer = AttentionLayer("layer", "full_attention", window, 0.3, softcap)
    geometry = ModelGeometry("test", N_Q_HEADS, N_KV_HEADS, HEAD_DIM, 512, (layer,))
    module = torch.nn.Identity()
    run = CodedRun(geometry, (module,), coding, protocol)
    found = run.attend(module, q, k, v).transpose(1, 2)
    expected = brute_force(q, k, v, protocol, coding, window, softcap)
    # Softmax under a soft cap is taken in float32, as models do.
    assert (found - expected).abs().max() < (1e-5 if softcap else 1e-12)


def test_protocols_agree_on_what_is_coded() -> None:
    """What is read coded by the last query is stored coded, and handed to the coding."""
    for protocol in (UniformProtocol(5, 2), RetentionProtocol(20), UniformProtocol(0, 0)):
        n_tokens = 33
        positions = torch.arange(n_tokens)
        read = protocol.reads_coded(positions, positions)
        stored = protocol.coded_positions(n_tokens)
        read_ever = set(read.any(dim=0).nonzero()[:, 0].tolist())
        assert read_ever <= set(stored)
        assert max(read_ever) < protocol.coded_span(n_tokens, 1)
        for group in (1, 8, 32):
            assert protocol.coded_span(n_tokens, group) <= n_tokens
        assert not (read & (positions[:, None] <= positions[None, :])).any()


def test_no_mask_is_larger_than_a_block_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    attention = masked_attention.softmax_attention

    def counted(query: Tensor, *others: Any) -> Tensor:
        asked.append(query.shape[2])
        return attention(query, *others)

    monkeypatch.setattr(masked_attention, "QUERY_BLOCK", 16)
    monkeypatch.setattr(masked_attention, "softmax_attention", counted)
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(1, N_KV_HEADS, 70, HEAD_DIM, generator=generator)
    coded = CodedTokens(keys[0].transpose(0, 1), keys[0].transpose(0, 1))
    columns = masked_attention.CacheColumns.of(keys, keys, coded, N_Q_HEADS)
    query = torch.randn(N_Q_HEADS, 40, HEAD_DIM, generator=generator)
    after = torch.arange(30, 70)
    found = columns.attend(query, after, RetentionProtocol(30), window=0, scale=0.3, softcap=0.0)
    assert asked == [16, 16, 8] and found.shape == query.shape
