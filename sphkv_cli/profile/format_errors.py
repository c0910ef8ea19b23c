"""What one storage format does to the keys and values of a context: made, predicted, bounded.

    made        ||e||^2 with e = x - xhat, the error that encoding really made
    predicted   D ||x||^2            spherical: closed-form D for isotropic vectors
                d s^2 / 12           int8: uniform error in a cell of width s, the stored scale
                ||x||^2 2^-14 / (32 ln 2)   bf16: 8 significant bits, magnitudes log-uniform
    bound       on ||e||             spherical: from the cells and radii; int8: sqrt(d) s / 2;
                                     bf16: 2^-8 ||x||

An isotropic error moves a scaled logit by softmax_scale ||q|| ||e|| / sqrt(d) (rms); any error by
at most softmax_scale ||q|| ||e||.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_cli.errors import SphkvError
from sphkv_codebooks.distortion import vector_error_bound
from sphkv_codebooks.encoded import EncodedVectors
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.int8_code import Int8Vectors
from sphkv_kernels.tier import RegionFormat, TierFormat
from sphkv_kernels.vectors import decode_vectors, encode_vectors

_BF16_RELATIVE_MSE = 2.0**-14 / (32.0 * math.log(2.0))
_BF16_UNIT_ROUNDOFF = 2.0**-8


@dataclass(frozen=True)
class CodedContext:
    """A context in one format: decoded ``(n_context, n_kv_heads, head_dim) float64``; made_sq,
    predicted_sq, bound: ``(n_context, n_kv_heads) float64``, of ||e||^2, ||e||^2 and ||e||."""

    decoded: Tensor
    made_sq: Tensor
    predicted_sq: Tensor
    bound: Tensor


@dataclass(frozen=True)
class CodedTier:
    """Keys and values of a context in one tier."""

    keys: CodedContext
    values: CodedContext


def code_tiers(
    tiers: tuple[TierFormat, ...], keys: Tensor, values: Tensor, layer: int
) -> tuple[CodedTier, ...]:
    """A context in every tier; each distinct format is encoded once.

    Args:
        keys, values: (n_context, n_kv_heads, head_dim) float32 in the frame.

    Raises:
        SphkvError: a vector that a format cannot hold; names format and layer.
    """
    key_cache: dict[str, CodedContext] = {}
    value_cache: dict[str, CodedContext] = {}
    coded = []
    for tier in tiers:
        parts = []
        for cache, kind, x in (
            (key_cache, tier.key_format, keys),
            (value_cache, tier.value_format, values),
        ):
            name = kind.digest if isinstance(kind, SphericalCode) else kind
            if name not in cache:
                cache[name] = _code(kind, x, layer)
            parts.append(cache[name])
        coded.append(CodedTier(*parts))
    return tuple(coded)


def _code(kind: RegionFormat, x: Tensor, layer: int) -> CodedContext:
    try:
        stored = encode_vectors(kind, x)
    except (CodeError, ValueError) as error:
        name = kind.name if isinstance(kind, SphericalCode) else kind
        raise SphkvError(
            f"{name} cannot encode layer {layer}: {error}", "leave this tier out of the allocation"
        ) from error
    exact = x.to(torch.float64)
    decoded = decode_vectors(kind, stored)
    norm_sq = exact.square().sum(-1)
    if isinstance(kind, SphericalCode):
        assert isinstance(stored, EncodedVectors)
        predicted_sq = norm_sq * _distortion(kind)
        bound = vector_error_bound(kind, x, stored)
    elif kind == "int8":
        assert isinstance(stored, Int8Vectors)
        scale = stored.scales.to(torch.float64)
        predicted_sq = scale.square() * (x.shape[-1] / 12)
        bound = scale * (math.sqrt(x.shape[-1]) / 2)
    else:
        predicted_sq = norm_sq * _BF16_RELATIVE_MSE
        bound = norm_sq.sqrt() * _BF16_UNIT_ROUNDOFF
    return CodedContext(decoded, (exact - decoded).square().sum(-1), predicted_sq, bound)


@functools.lru_cache(maxsize=64)
def _distortion(code: SphericalCode) -> float:
    return code.distortion()
