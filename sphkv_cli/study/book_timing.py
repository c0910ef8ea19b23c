"""What books cost: coding a long prompt, then one more token and a read of all that is coded.

    prefill     encode the keys and values of n_tokens, books fitted first where they are online
    generation  encode one token; decode n_tokens of keys and values and attend to them

One layer of the model's shape, wall-clock on the CPU in torch: the fastest of `N_ROUNDS` rounds,
each of which runs every codec once.  Codes lie one per byte for every method, none is packed, and
no method has a fused kernel here.  Source: ours; KIVI's codec, arXiv 2402.02750.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sphkv_cli.study.calibration import HeadCodes, online_codes
from sphkv_codebooks.comparators.min_max import MinMaxCodes, encode_min_max
from sphkv_codebooks.comparators.token_groups import cut_axis
from sphkv_codebooks.encoded import EncodedVectors
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode

N_ROUNDS = 5
KIVI_GROUP = 32


@dataclass(frozen=True)
class Cost:
    """Milliseconds of one layer; fit_ms is the part of prefill_ms that fits books."""

    name: str
    code_rate: float
    prefill_ms: float
    fit_ms: float
    token_ms: float
    read_ms: float

    @property
    def generation_ms(self) -> float:
        """Of one more token."""
        return self.token_ms + self.read_ms


class Codec(ABC):
    """Codes keys and values (n_tokens, n_kv_heads, head_dim) of one layer."""

    @abstractmethod
    def prepare(self, keys: Tensor, values: Tensor) -> None:
        """What a prompt needs before it is coded; does nothing where books are there already."""

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor) -> None:
        """Code the prompt and keep the codes."""

    @abstractmethod
    def encode_token(self, key: Tensor, value: Tensor) -> None:
        """Code one token (1, n_kv_heads, head_dim)."""

    @abstractmethod
    def decode(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompt in the codec's frame, (n_kv_heads, n_tokens, head_dim)."""


class PolarCodec(Codec):
    """A spherical code behind a rotation; codes given per head, or fitted to each prompt."""

    def __init__(
        self, code: SphericalCode, rotation: Rotation, fitted: HeadCodes | None, *, online: bool
    ) -> None:
        self._code, self._rotation, self._fitted, self._online = code, rotation, fitted, online
        self._keys: list[EncodedVectors] = []
        self._values: list[EncodedVectors] = []

    def prepare(self, keys: Tensor, values: Tensor) -> None:
        if self._online:
            turn = self._rotation.apply
            self._fitted = online_codes(self._code, turn(keys), turn(values))

    def encode(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = self._encode(keys, 0), self._encode(values, 1)

    def encode_token(self, key: Tensor, value: Tensor) -> None:
        self._encode(key, 0)
        self._encode(value, 1)

    def decode(self) -> tuple[Tensor, Tensor]:
        return self._decode(self._keys, 0), self._decode(self._values, 1)

    def _encode(self, vectors: Tensor, kind: int) -> list[EncodedVectors]:
        turned = self._rotation.apply(vectors)
        if self._fitted is None:
            return [self._code.encode(turned)]
        return [code.encode(turned[:, head]) for head, code in enumerate(self._fitted[kind])]

    def _decode(self, encoded: Sequence[EncodedVectors], kind: int) -> Tensor:
        if self._fitted is None:
            return self._code.decode(encoded[0]).transpose(0, 1)
        codes = self._fitted[kind]
        return torch.stack([c.decode(e) for c, e in zip(codes, encoded, strict=True)])


class KiviCodec(Codec):
    """KIVI: keys per channel over 32 tokens, values per token over 32 channels."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._keys: MinMaxCodes | None = None
        self._values: MinMaxCodes | None = None

    def prepare(self, keys: Tensor, values: Tensor) -> None:
        return

    def encode(self, keys: Tensor, values: Tensor) -> None:
        group = min(KIVI_GROUP, keys.shape[-1])
        by_head = cut_axis(keys.transpose(0, 1), -2, KIVI_GROUP)
        self._keys = encode_min_max(by_head, self._bits, dim=-2)
        cut = cut_axis(values.transpose(0, 1), -1, group)
        self._values = encode_min_max(cut, self._bits, dim=-1)

    def encode_token(self, key: Tensor, value: Tensor) -> None:
        # The key waits, dense, until its group is full: a group's cost, spread over its tokens,
        # is below what one call costs and is left out in its favour.
        group = min(KIVI_GROUP, value.shape[-1])
        encode_min_max(cut_axis(value.transpose(0, 1), -1, group), self._bits, dim=-1)

    def decode(self) -> tuple[Tensor, Tensor]:
        assert self._keys is not None and self._values is not None, "encode comes first"
        return self._keys.decode().flatten(-3, -2), self._values.decode().flatten(-2, -1)


def measure_costs(
    codecs: Sequence[tuple[str, float, Codec]], keys: Tensor, values: Tensor, queries: Tensor
) -> list[Cost]:
    """Time codecs given by name and code rate; queries: (n_q_heads, head_dim) of one token."""
    steps = [
        (
            lambda codec=codec: codec.prepare(keys, values),
            lambda codec=codec: codec.encode(keys, values),
            lambda codec=codec: codec.encode_token(keys[:1], values[:1]),
            lambda codec=codec: attend(queries, *codec.decode()),
        )
        for *_, codec in codecs
    ]
    rounds = [[[_ms(step) for step in of_codec] for of_codec in steps] for _ in range(1 + N_ROUNDS)]
    fastest = np.min(rounds[1:], axis=0)  # the first round warms up
    return [
        Cost(name, rate, float(fit + encode), float(fit), float(token), float(read))
        for (name, rate, _), (fit, encode, token, read) in zip(codecs, fastest, strict=True)
    ]


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one token: (n_q_heads, head_dim)."""
    grouped = queries.reshape(keys.shape[0], -1, queries.shape[-1])
    logits = grouped @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    return (torch.softmax(logits, dim=-1) @ values).flatten(0, 1)


def synthetic_prompt(
    n_tokens: int, n_q_heads: int, n_kv_heads: int, head_dim: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian keys and values (n_tokens, n_kv_heads, head_dim), queries (n_q_heads, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n_tokens, n_kv_heads, head_dim)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    return keys, values, torch.randn(n_q_heads, head_dim, generator=generator)


def _ms(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)
