"""The parallel forward is stepwise decoding from a cache that is really read, token by token.

The truth here is transformers' own decoding, one token per forward, from a Cache of this file that
stores codes and decodes them again for every query.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from sphkv_cli.errors import UsageError
from sphkv_cli.evaluation.coding import KeyValueCoding
from sphkv_cli.evaluation.comparator_coding import ComparatorCoding
from sphkv_cli.evaluation.frame_coding import FrameCoding
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.plan_coding import PlanCoding
from sphkv_cli.evaluation.protocol import RetentionProtocol, UniformProtocol
from sphkv_codebooks.comparators.kivi import KiviKeys, KiviValues
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotary import rotate
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.tier import TierFormat

# float64 throughout; only the codes are decided in float32, from inputs that agree to 1e-15.
ROUNDING = 1e-9
HEAD_DIM = 32

Judged = Callable[[str], JudgedModel]
Store = Callable[[int, Tensor, Tensor, int], Callable[[], tuple[Tensor, Tensor]]]
"""Codes (layer, keys, values (n, n_kv_heads, d), first position); gives what reads them back."""


@dataclass
class CodedLayer(DynamicLayer):
    """Dense for `window` tokens and the first ones, then coded group by group and only read back.

    Positions of coded tokens are overwritten with NaN: reading one dense would show.
    """

    layer: int
    store: Store
    window: int
    first_tokens: int
    group: int
    stored: list[Callable[[], tuple[Tensor, Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        keys, values = super().update(key_states, value_states)
        n_far = max(keys.shape[2] - 1 - self.window, 0)
        while len(self.stored) * self.group < n_far:
            first = len(self.stored) * self.group
            tokens = slice(first, first + self.group)
            read = self.store(self.layer, _rows(keys, tokens), _rows(values, tokens), first)
            self.stored.append(read)
        read_keys, read_values = keys.clone(), values.clone()
        if n_far:
            coded = [read() for read in self.stored]
            coded_keys = torch.cat([pair[0] for pair in coded])[:n_far].transpose(0, 1)
            coded_values = torch.cat([pair[1] for pair in coded])[:n_far].transpose(0, 1)
            read_keys[0, :, self.first_tokens : n_far] = coded_keys[:, self.first_tokens :]
            read_values[0, :, self.first_tokens : n_far] = coded_values[:, self.first_tokens :]
            whole = min(n_far // self.group * self.group, n_far)
            self.keys[:, :, self.first_tokens : whole] = torch.nan
            self.values[:, :, self.first_tokens : whole] = torch.nan
        return read_keys, read_values


def _rows(x: Tensor, tokens: slice) -> Tensor:
    return x[0, :, tokens].transpose(0, 1)


def decode_stepwise(judged: JudgedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Logits (n_tokens, vocabulary), one token per forward pass."""
    rows = []
    with torch.inference_mode():
        for position in range(ids.numel()):
            step = ids[None, position : position + 1]
            rows.append(judged.model(input_ids=step, past_key_values=cache).logits[0, 0])
    return torch.stack(rows)


def stepwise(
    judged: JudgedModel, ids: Tensor, store: Store, protocol: UniformProtocol, group: int = 1
) -> Tensor:
    layers = [
        CodedLayer(layer, store, protocol.window, protocol.first_tokens, group)
        for layer in range(judged.geometry.n_layers)
    ]
    return decode_stepwise(judged, ids, Cache(layers=layers))


def parallel(judged: JudgedModel, ids: Tensor, coding: KeyValueCoding, protocol: Any) -> Tensor:
    hidden, _ = judged.coded_hidden(ids, coding, protocol)
    return judged.head(hidden)


def dense(judged: JudgedModel, ids: Tensor) -> Tensor:
    return judged.head(judged.dense_hidden(ids))


def code_4222() -> SphericalCode:
    return SphericalCode.analytic("paper", HEAD_DIM, (4, 2, 2, 2), "fp16")


def key_mean() -> np.ndarray:
    return np.random.default_rng(5).normal(0, 0.5, (3, 2, HEAD_DIM)).astype(np.float32)


def stored_codes(rotation: Rotation, mean: np.ndarray | None, code: SphericalCode) -> Store:
    """Codes kept as codes; frame and decode written out in float64."""
    S = torch.from_numpy(rotation.matrix())

    def store(layer: int, keys: Tensor, values: Tensor, first: int) -> Any:
        del first
        c = torch.zeros(2, HEAD_DIM) if mean is None else torch.from_numpy(mean[layer])
        framed = rotation.apply((keys.float() - c).float())
        coded_keys = code.encode(framed)
        coded_values = code.encode(rotation.apply(values.float()))

        @cache
        def read() -> tuple[Tensor, Tensor]:
            read_keys = code.decode(coded_keys, torch.float64) @ S + c
            return read_keys, code.decode(coded_values, torch.float64) @ S

        return read

    return store


@pytest.mark.parametrize(
    "family, window, first_tokens",
    [("llama", 8, 2), ("qwen2", 1, 3), ("gemma3", 8, 2), ("llama", 0, 0)],
)
def test_parallel_equals_stepwise_from_stored_codes(
    judged: Judged, token_ids: Tensor, family: str, window: int, first_tokens: int
) -> None:
    model, protocol = judged(family), UniformProtocol(window, first_tokens)
    rotation, mean = Rotation("hadamard", HEAD_DIM, 42), key_mean()
    frames = FrameSet(rotation, "post_rope", mean)
    coding = FrameCoding(TierFormat.spherical(code_4222()), frames, model.shape)
    found = parallel(model, token_ids, coding, protocol)
    expected = stepwise(model, token_ids, stored_codes(rotation, mean, code_4222()), protocol)
    # FrameCoding decodes in float32: a coordinate of 8 may be off by 1e-6.
    assert (found - expected).abs().max() < 1e-4
    # And it is the coded cache that both have read.
    assert (expected - dense(model, token_ids)).abs().max() > 0.01


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_groups_of_tokens_wait_until_they_are_full(
    judged: Judged, token_ids: Tensor, family: str
) -> None:
    model, protocol = judged(family), UniformProtocol(window=31, first_tokens=4)
    coding = ComparatorCoding("KIVI-2", KiviKeys(2), KiviValues(2), model.shape)

    def store(layer: int, keys: Tensor, values: Tensor, first: int) -> Any:
        positions = torch.arange(first, first + keys.shape[0])
        coded = coding.code(layer, keys.float(), values.float(), positions)
        assert keys.shape[0] == 32
        return lambda: (coded.keys.double(), coded.values.double())

    expected = stepwise(model, token_ids, store, protocol, group=32)
    found = parallel(model, token_ids, coding, protocol)
    assert (found - expected).abs().max() < ROUNDING
    assert (expected - dense(model, token_ids)).abs().max() > 0.01


def test_a_window_shorter_than_a_group_is_refused(judged: Judged, token_ids: Tensor) -> None:
    model = judged("llama")
    coding = ComparatorCoding("KIVI-2", KiviKeys(2), KiviValues(2), model.shape)
    with pytest.raises(UsageError, match="--window 31"):
        parallel(model, token_ids, coding, UniformProtocol(window=30))


def test_pre_rope_centring_uses_each_tokens_position(judged: Judged, token_ids: Tensor) -> None:
    model, protocol = judged("llama"), UniformProtocol(window=4, first_tokens=1)
    inv_freq = model.model.model.rotary_emb.inv_freq.float()
    mean = torch.from_numpy(key_mean())
    rotation = Rotation("haar", HEAD_DIM, 1)
    frames = FrameSet(rotation, "pre_rope", key_mean(), inv_freq=inv_freq.expand(3, -1).numpy())
    code = code_4222()
    coding = FrameCoding(TierFormat.spherical(code), frames, model.shape)
    plain = stored_codes(rotation, None, code)

    def store(layer: int, keys: Tensor, values: Tensor, first: int) -> Any:
        # R_t mu by transformers' own rotation of a constant key.
        where = torch.arange(first, first + keys.shape[0])[None]
        cos, sin = model.model.model.rotary_emb(keys, where)
        mu = mean[layer].double()[None]
        half = HEAD_DIM // 2
        turned = torch.cat([-mu[..., half:], mu[..., :half]], dim=-1)
        c = (mu * cos[0][:, None] + turned * sin[0][:, None]).float()
        read = plain(layer, keys.float() - c, values, first)
        return lambda: (read()[0] + c, read()[1])

    found = parallel(model, token_ids, coding, protocol)
    expected = stepwise(model, token_ids, store, protocol)
    assert (found - expected).abs().max() < 1e-4


def test_rotating_back_undoes_rotating() -> None:
    keys = torch.randn(7, 2, HEAD_DIM, dtype=torch.float64)
    inv_freq = torch.logspace(0, -3, HEAD_DIM // 2, dtype=torch.float64)
    positions = torch.arange(100, 107)
    back = rotate(rotate(keys, positions, inv_freq), -positions, inv_freq)
    assert torch.allclose(back, keys, atol=1e-12)


def test_retention_equals_decoding_after_a_context_coded_once(
    judged: Judged, token_ids: Tensor
) -> None:
    model, n_context = judged("llama"), 41
    rng = np.random.default_rng(2)
    tiers = (TierFormat.spherical(code_4222()), TierFormat.int8(), TierFormat.dense())
    # Heads agree in what they drop, so that a plain cache without those tokens is the truth.
    dropped = rng.random(n_context) < 0.3
    plan = rng.integers(0, 3, (3, 2, n_context)).astype(np.int8)
    plan[:, :, dropped] = -1
    frames = FrameSet(Rotation("hadamard", HEAD_DIM, 42), "post_rope", key_mean())
    coding = PlanCoding("plan", tiers, frames, model.shape, plan, 0)
    found = parallel(model, token_ids, coding, RetentionProtocol(n_context))
    assert (found - dense(model, token_ids))[:n_context].abs().max() < ROUNDING

    after = Cache(layers=[DynamicLayer() for _ in range(3)])
    kept = torch.from_numpy(~dropped)
    with torch.inference_mode():
        model.model(input_ids=token_ids[None, :n_context], past_key_values=after)
        for layer, content in enumerate(after.layers):
            keys, values = (x[0].transpose(0, 1).float() for x in (content.keys, content.values))
            coded = coding.code(layer, keys, values, torch.arange(n_context))
            content.keys = coded.keys.double()[kept].transpose(0, 1)[None]
            content.values = coded.values.double()[kept].transpose(0, 1)[None]
        for position in range(n_context, len(token_ids)):
            logits = model.model(
                input_ids=token_ids[None, position : position + 1],
                past_key_values=after,
                position_ids=torch.tensor([[position]]),
            ).logits[0, 0]
            assert (found[position] - logits).abs().max() < ROUNDING
    assert (found - dense(model, token_ids))[n_context:].abs().max() > 0.01
