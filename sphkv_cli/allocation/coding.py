"""Keys and values of a context as every tier would return them: encoded and decoded, in the frame.

Errors are made, not modelled.  Tiers that share a key or a value format share its coded vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_cli.errors import SphkvError
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.tier import RegionFormat, TierFormat
from sphkv_kernels.vectors import decode_vectors, encode_vectors


@dataclass(frozen=True)
class TierFormats:
    """Distinct key and value formats of a list of tiers, so that each is encoded once.

    key_of_tier, value_of_tier: (n_tiers) index of each tier's format; same_value: per key format
    the index of the value format that equals it, or None.
    """

    key_formats: tuple[RegionFormat, ...]
    value_formats: tuple[RegionFormat, ...]
    key_of_tier: tuple[int, ...]
    value_of_tier: tuple[int, ...]
    same_value: tuple[int | None, ...]

    @staticmethod
    def of(tiers: Sequence[TierFormat]) -> "TierFormats":
        """Formats in order of first use."""
        keys, key_of_tier = _distinct([tier.key_format for tier in tiers])
        values, value_of_tier = _distinct([tier.value_format for tier in tiers])
        identities = [_identity(kind) for kind in values]
        same_value = tuple(
            identities.index(_identity(kind)) if _identity(kind) in identities else None
            for kind in keys
        )
        return TierFormats(keys, values, key_of_tier, value_of_tier, same_value)

    @property
    def n_tiers(self) -> int:
        return len(self.key_of_tier)


@dataclass(frozen=True)
class CodedContext:
    """Decoded vectors (n_context, n_kv_heads, head_dim) float32, one per distinct format."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    formats: TierFormats

    @staticmethod
    def encode(keys: Tensor, values: Tensor, formats: TierFormats, layer: int) -> "CodedContext":
        """Send keys and values (n_context, n_kv_heads, head_dim) in the frame through all formats.

        Raises:
            SphkvError: a vector that a format cannot hold; names format and layer.
        """
        both = torch.stack([keys, values])
        coded_keys: list[Tensor] = []
        coded_values: dict[int, Tensor] = {}
        for kind, same in zip(formats.key_formats, formats.same_value, strict=True):
            if same is None:
                coded_keys.append(round_trip(kind, keys, layer))
            else:
                key, coded_values[same] = round_trip(kind, both, layer)
                coded_keys.append(key)
        for index, kind in enumerate(formats.value_formats):
            if index not in coded_values:
                coded_values[index] = round_trip(kind, values, layer)
        ordered = tuple(coded_values[index] for index in range(len(formats.value_formats)))
        return CodedContext(tuple(coded_keys), ordered, formats)

    def of_tier(self, tier: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one tier."""
        key, value = self.formats.key_of_tier[tier], self.formats.value_of_tier[tier]
        return self.keys[key], self.values[value]


def round_trip(kind: RegionFormat, vectors: Tensor, layer: int) -> Tensor:
    """Encode and decode vectors (..., head_dim) in the frame; float32.

    Raises:
        SphkvError: a vector that the format cannot hold; names format and layer.
    """
    try:
        if isinstance(kind, SphericalCode):
            return kind.decode(kind.encode(vectors))
        return decode_vectors(kind, encode_vectors(kind, vectors)).to(torch.float32)
    except (CodeError, ValueError) as error:
        name = kind.name if isinstance(kind, SphericalCode) else kind
        raise SphkvError(
            f"{name} cannot encode layer {layer}: {error}",
            "leave this tier out with --tier, or check the capture with `sphkv inspect --verify`",
        ) from error


def code_tokens(
    keys: Tensor, values: Tensor, tiers: Sequence[TierFormat], option: Tensor, layer: int
) -> tuple[Tensor, Tensor]:
    """Keys and values in the frame with every token in its tier, dropped ones as they are.

    Args:
        keys, values: (n_context, n_kv_heads, head_dim).
        option: (n_context, n_kv_heads), 0 = dropped, else one more than the tier.
    """
    coded_keys, coded_values = keys.clone(), values.clone()
    for index, tier in enumerate(tiers, start=1):
        chosen = option == index
        if bool(chosen.any()):
            coded_keys[chosen] = round_trip(tier.key_format, keys[chosen], layer)
            coded_values[chosen] = round_trip(tier.value_format, values[chosen], layer)
    return coded_keys, coded_values


def _identity(kind: RegionFormat) -> str:
    return kind.digest if isinstance(kind, SphericalCode) else kind


def _distinct(
    kinds: Sequence[RegionFormat],
) -> tuple[tuple[RegionFormat, ...], tuple[int, ...]]:
    found: dict[str, tuple[int, RegionFormat]] = {}
    for kind in kinds:
        found.setdefault(_identity(kind), (len(found), kind))
    distinct = tuple(kind for _, kind in found.values())
    return distinct, tuple(found[_identity(kind)][0] for kind in kinds)
