"""Vectors as a region of a page stores them, before they become bytes.

``stored = encode(format, x)``, ``xhat = decode(format, stored)`` for the three kinds of format:
a spherical code (`EncodedVectors`), int8 with one scale per vector (`Int8Vectors`) and dense
(a bfloat16 tensor).  All of them live in the frame (centred, rotated).  Source: ours.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sphkv_codebooks.encoded import EncodedVectors
from sphkv_codebooks.radius_coding import FP16_MAX
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.int8_code import Int8Vectors, decode_int8, encode_int8
from sphkv_kernels.tier import RegionFormat

StoredVectors = EncodedVectors | Int8Vectors | Tensor


def encode_vectors(region_format: RegionFormat, x: Tensor) -> StoredVectors:
    """Encode ``x (..., head_dim)`` in the frame.

    Raises:
        ValueError: NaN, Inf, or what the format cannot hold.
    """
    if isinstance(region_format, SphericalCode):
        return region_format.encode(x)
    if region_format == "int8":
        return encode_int8(x)
    stored = x.to(torch.bfloat16)
    if not bool((stored.float().abs() <= FP16_MAX).all()):  # bf16 itself rounds the limit up
        raise ValueError(
            f"dense tier: a vector holds NaN, Inf or more than {FP16_MAX:g}, which fp16 "
            "fragments do not hold; check the captured activations"
        )
    return stored


def decode_vectors(region_format: RegionFormat, stored: StoredVectors) -> Tensor:
    """``xhat (..., head_dim) float64``."""
    if isinstance(region_format, SphericalCode):
        assert isinstance(stored, EncodedVectors)
        return region_format.decode(stored, torch.float64)
    if region_format == "int8":
        assert isinstance(stored, Int8Vectors)
        return decode_int8(stored)
    assert isinstance(stored, Tensor)
    return stored.to(torch.float64)


def map_tensors(stored: StoredVectors, change: Callable[[Tensor], Tensor]) -> StoredVectors:
    """Apply one change of the leading axes (an index, a reshape of rows) to every tensor."""

    def maybe(t: Tensor | None) -> Tensor | None:
        return None if t is None else change(t)

    if isinstance(stored, Tensor):
        return change(stored)
    if isinstance(stored, Int8Vectors):
        return Int8Vectors(change(stored.codes), change(stored.scales))
    return EncodedVectors(
        angle_codes=tuple(change(codes) for codes in stored.angle_codes),
        radius_codes=maybe(stored.radius_codes),
        radii=maybe(stored.radii),
        norms=maybe(stored.norms),
    )


def placed_rows(stored: StoredVectors, slots: Tensor, n_slots: int) -> StoredVectors:
    """Rows of ``stored`` at ``slots (n_rows)`` of ``n_slots`` otherwise zero rows."""

    def place(t: Tensor) -> Tensor:
        out = torch.zeros((n_slots, *t.shape[1:]), dtype=t.dtype, device=t.device)
        out[slots] = t
        return out

    return map_tensors(stored, place)


def zeroed_rows(stored: StoredVectors, dead: Tensor) -> StoredVectors:
    """The same vectors with zeros in the dead rows; dead: ``(...) bool`` over the leading axes."""

    def zero(t: Tensor) -> Tensor:
        return t.masked_fill(dead.reshape(*dead.shape, *[1] * (t.ndim - dead.ndim)), 0)

    return map_tensors(stored, zero)


def poisoned_rows(stored: StoredVectors, dead: Tensor, radius_bits: int) -> StoredVectors:
    """The same vectors with NaN in every floating-point field of the dead rows.

    dead: ``(n_rows) bool``.  Radius codes become all ones (``radius_bits`` of them), the largest
    radius there is, so that a code without any floating-point field betrays a reader too.
    """

    def poison(t: Tensor) -> Tensor:
        out = t.clone()
        if t.dtype.is_floating_point:
            out[dead] = torch.nan
        return out

    poisoned = map_tensors(stored, poison)
    if isinstance(poisoned, EncodedVectors) and poisoned.radius_codes is not None:
        poisoned.radius_codes[dead] = (1 << radius_bits) - 1
    return poisoned


def reshape_rows(stored: StoredVectors, n_pages: int, page_size: int) -> StoredVectors:
    """``(n_pages * page_size, ...)`` to ``(n_pages, page_size, ...)``."""
    return map_tensors(stored, lambda t: t.reshape(n_pages, page_size, *t.shape[1:]))
