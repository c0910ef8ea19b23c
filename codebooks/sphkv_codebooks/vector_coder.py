"""Encoding and decoding of many vectors: chunks laid out coordinate-major, one pass per level.

The order of operations is part of the format (spherical_code.py): pairs, radii and sums over radii
combine neighbours (2j, 2j+1) level by level, each float32 operation rounded on its own; the norm is
the radius of the full-depth recursion.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from sphkv_codebooks.direction_tables import complex_table, cos_sin_of
from sphkv_codebooks.encoded import EncodedVectors, concatenate
from sphkv_codebooks.encoder import encode_pairs, pair_radius
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.radius import LloydMaxRadius, StoredRadii, to_fp16

if TYPE_CHECKING:
    from sphkv_codebooks.spherical_code import SphericalCode

# Temporaries of a chunk should stay in a core's cache on a CPU; a GPU wants few launches.
_CHUNK_CPU = 2048
_CHUNK_GPU = 1 << 18


def encode_vectors(code: SphericalCode, x: torch.Tensor, *, check: bool) -> EncodedVectors:
    """The body of SphericalCode.encode."""
    if x.ndim < 1 or x.shape[-1] != code.head_dim:
        raise CodeError(
            f"{code.name} codes vectors of head_dim {code.head_dim}, got a tensor {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise CodeError(f"{code.name} codes floating point vectors, got {x.dtype}")
    flat = x.detach().reshape(-1, code.head_dim)
    size = _CHUNK_CPU if x.device.type == "cpu" else _CHUNK_GPU
    # At least one chunk, so that no vectors encode to empty tensors of the right shapes.
    starts = range(0, max(flat.shape[0], 1), size)
    chunks = [_encode_chunk(code, flat[start : start + size], check) for start in starts]
    return concatenate(chunks).reshape(x.shape[:-1])


def _encode_chunk(code: SphericalCode, x: torch.Tensor, check: bool) -> EncodedVectors:
    columns = x.to(torch.float32).T.contiguous()  # (head_dim, n_vectors)
    first, second = _halves(columns, code.pairing)
    # <x, unit-radius decode> of each node, by the angle-domain recursion with q = x.
    self_dot = columns
    angle_codes = []
    for level, book in enumerate(code.codebooks, start=1):
        codes = encode_pairs(book, first, second)
        angle_codes.append(codes.T.contiguous())
        if code.gain != "none":
            left, right = _halves(self_dot, code.pairing if level == 1 else "adjacent")
            cosine, sine = cos_sin_of(book, codes, torch.float32)
            self_dot = (cosine * left).add_(sine * right)
        radii = pair_radius(first, second)
        first, second = radii[0::2], radii[1::2]
    stored = _encode_radii(code, radii, self_dot, columns if check else None)
    return EncodedVectors(tuple(angle_codes), stored.codes, stored.radii, stored.norms)


def _encode_radii(
    code: SphericalCode, radii: torch.Tensor, self_dot: torch.Tensor, checked: torch.Tensor | None
) -> StoredRadii:
    """radii, self_dot: (n_radii, n_vectors) float32; checked: the input, or None for no check."""
    coding = code.radius_coding
    norms = radii
    while norms.shape[0] > 1:
        norms = pair_radius(norms[0::2], norms[1::2])
    norms = norms[0]
    if isinstance(coding, LloydMaxRadius):
        stored = coding.encode(radii.T.contiguous(), norms)
        if code.gain != "none" and stored.codes is not None:
            relative = coding.relative_radii(stored.codes, torch.float32).T
            along = _pairwise_sum(relative * self_dot)
            power = _pairwise_sum(relative * relative)
            kept = folded_gain(code.gain, norms, along, power)
            stored = StoredRadii(codes=stored.codes, norms=to_fp16(kept))
        else:
            kept = norms
    else:
        # One stored radius per block: its unit decode has power 1, least squares is <x, u> itself.
        kept = radii
        if code.gain != "none":
            kept = folded_gain(code.gain, radii, self_dot, torch.ones_like(radii))
        stored = coding.encode(kept.T.contiguous(), norms)
    if checked is not None and kept.numel():
        _refuse_unstorable(code, checked, float(norms.max()), float(kept.max()))
    return stored


def _refuse_unstorable(
    code: SphericalCode, x: torch.Tensor, largest_norm: float, largest_stored: float
) -> None:
    """NaN and Inf anywhere in x show in the largest norm: max lets NaN through."""
    if not math.isfinite(largest_norm) and not bool(torch.isfinite(x).all()):
        raise CodeError(
            f"{code.name}: the vectors to encode hold NaN or Inf; find the layer that produced "
            "them before coding its cache"
        )
    coding = code.radius_coding
    if not max(largest_norm, largest_stored) < math.inf or largest_stored > coding.largest:
        raise CodeError(
            f"{code.name}: a radius of {max(largest_stored, largest_norm):.6g} does not fit "
            f"{coding.spec} (largest {coding.largest:.6g}); scale the vectors down or keep them "
            "dense"
        )


def folded_gain(
    gain: str, norms: torch.Tensor, along: torch.Tensor, power: torch.Tensor
) -> torch.Tensor:
    """The norm to store so that x is met best by norm * v, with along = <x, v>, power = ||v||^2.

    least_squares: <x, v> / ||v||^2. unbiased: ||x||^2 / <x, v>. Zero where <x, v> is not positive.
    """
    corrected = along / power if gain == "least_squares" else norms * norms / along
    return torch.where(along > 0, corrected, torch.zeros_like(corrected))


def decode_vectors(
    code: SphericalCode, encoded: EncodedVectors, *, dtype: torch.dtype
) -> torch.Tensor:
    """The body of SphericalCode.decode."""
    if dtype not in (torch.float32, torch.float64):
        raise CodeError(f"{code.name} decodes to float32 or float64, not {dtype}; convert after")
    expected = tuple(codes.shape[-1] for codes in encoded.angle_codes)
    if expected != code.n_angles:
        raise CodeError(
            f"{code.name} has {code.n_angles} angles per level, the encoded vectors {expected}: "
            "they belong to another code"
        )
    leading = encoded.shape
    n_vectors = leading.numel()
    flat = encoded.reshape((n_vectors,))
    device = encoded.angle_codes[0].device
    size = _CHUNK_CPU if device.type == "cpu" else _CHUNK_GPU
    x = torch.empty((n_vectors, code.head_dim), dtype=dtype, device=device)
    for start in range(0, n_vectors, size):
        x[start : start + size] = _decode_chunk(code, flat[start : start + size], dtype)
    return x.reshape(*leading, code.head_dim)


def _decode_chunk(code: SphericalCode, encoded: EncodedVectors, dtype: torch.dtype) -> torch.Tensor:
    """Multiplies each radius by (cos, sin), written as a complex number: its parts are the pair."""
    x = code.radius_coding.decode(encoded.stored_radii, dtype)
    for level in range(code.depth, 0, -1):
        codes = encoded.angle_codes[level - 1]
        table = complex_table(code.codebooks[level - 1], codes.device, dtype)
        directions = torch.index_select(table, 0, codes.reshape(-1).long()).reshape(codes.shape)
        pairs = torch.view_as_real(directions * x)
        if level == 1 and code.pairing == "rope":
            pairs = pairs.transpose(-1, -2)
        x = pairs.flatten(-2)
    return x


def _halves(columns: torch.Tensor, pairing: str) -> tuple[torch.Tensor, torch.Tensor]:
    """split_pairs on the first axis."""
    if pairing == "adjacent":
        return columns[0::2], columns[1::2]
    half = columns.shape[0] // 2
    return columns[:half], columns[half:]


def _pairwise_sum(values: torch.Tensor) -> torch.Tensor:
    while values.shape[0] > 1:
        values = values[0::2] + values[1::2]
    return values[0]
