"""Launching the encoder: one loaded kernel per (tier's layouts, head_dim, rotation kind).

The books of the codes are the last member of the parameter struct. Registered with torch.library as
`sphkv::encode` and `sphkv::encode_rows`. Source: ours.
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sphkv_codebooks.rotation import Rotation
from sphkv_kernels.encode_source import N_THREADS, encode_params, encoder_source
from sphkv_kernels.launch import capability_of, launch_function, load_function
from sphkv_kernels.launch_arguments import FLOAT_TYPES
from sphkv_kernels.pages import page_bytes
from sphkv_kernels.tier import PageError, TierFormat
from sphkv_kernels.variant import SUPPORTED_HEAD_DIMS

_MAX_PARAMETER_BYTES = 4096


@dataclass(frozen=True, eq=False)
class Encoder:
    """A loaded encoder of one tier on one device."""

    tier: TierFormat
    head_dim: int
    signs: tuple[int, ...]
    books: bytes
    function: Any
    handle: int

    def launch(
        self,
        keys: Tensor,
        values: Tensor,
        pages: Tensor,
        refused: Tensor,
        page_size: int,
        offsets: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        """Enqueue one launch on torch's current stream of the keys' device."""
        params = encode_params(len(self.books) // 4)()
        for index, x in enumerate((keys, values)):
            strides = [0] * (4 - x.ndim) + list(x.stride())
            params.source[index] = x.data_ptr()
            params.outer_stride[index], params.page_stride[index] = strides[0], strides[1]
            params.row_stride[index] = strides[2]
        params.pages, params.refused = pages.data_ptr(), refused.data_ptr()
        params.offsets = None if offsets is None else offsets.data_ptr()
        params.rows = None if rows is None else rows.data_ptr()
        n_vectors = keys.numel() // self.head_dim
        params.n_vectors = n_vectors
        params.page_bytes = page_bytes(self.tier, self.head_dim, page_size)
        params.pages_per_outer = keys.shape[1] if keys.ndim == 4 else max(n_vectors // page_size, 1)
        params.page_size, params.type = page_size, FLOAT_TYPES[keys.dtype]
        params.signs[:] = self.signs
        ctypes.memmove(params.books, self.books, len(self.books))
        per_block = N_THREADS * 16 // self.head_dim
        grid = (-(-n_vectors // per_block), 2)
        launch_function(self.function, grid, N_THREADS, 0, keys.device, params)


_encoders: weakref.WeakValueDictionary[int, Encoder] = weakref.WeakValueDictionary()
_handles = itertools.count()


def _encoder_of(handle: int) -> Encoder:
    found = _encoders.get(handle)
    if found is None:
        raise PageError("the encoder of this call is gone; encode afresh instead of replaying it")
    return found


@lru_cache(maxsize=256)
def encoder_for(
    tier: TierFormat,
    head_dim: int,
    rotation: Rotation | None,
    single_rows: bool,
    device: torch.device,
) -> Encoder:
    """The encoder of a tier; its kernel is compiled (or found) and loaded at its first use.

    device: with its index.

    Raises:
        PageError: a head_dim or device that no kernel is built for, a rotation of another head_dim,
            or codebooks too large for a launch.
        KernelBuildError, KernelLaunchError: as `load_function`.
    """
    if head_dim not in SUPPORTED_HEAD_DIMS:
        raise PageError(f"head_dim {head_dim}: the CUDA encoder has {SUPPORTED_HEAD_DIMS}")
    if rotation is not None and rotation.head_dim != head_dim:
        raise PageError(f"the rotation has head_dim {rotation.head_dim}, the vectors {head_dim}")
    source = encoder_source(tier, head_dim, hadamard=rotation is not None, single_rows=single_rows)
    if ctypes.sizeof(encode_params(source.books.size)) > _MAX_PARAMETER_BYTES:
        raise PageError(f"tier {tier.name!r}: its codebooks do not fit a launch's parameters")
    function = load_function(source.text, "encode", 0, capability_of(device), device)
    signs = np.zeros(256, dtype=bool)
    if rotation is not None:
        signs[:head_dim] = rotation.signs < 0
    words = np.packbits(signs, bitorder="little").view(np.uint32)
    encoder = Encoder(
        tier, head_dim, tuple(words.tolist()), source.books.tobytes(), function, next(_handles)
    )
    _encoders[encoder.handle] = encoder
    return encoder


@torch.library.custom_op("sphkv::encode", mutates_args=())
def _encode_op(keys: Tensor, values: Tensor, handle: int) -> tuple[Tensor, Tensor]:
    encoder = _encoder_of(handle)
    page_size = keys.shape[-2]
    n_bytes = page_bytes(encoder.tier, encoder.head_dim, page_size)
    pages = torch.empty((*keys.shape[:-2], n_bytes), dtype=torch.uint8, device=keys.device)
    refused = torch.zeros((), dtype=torch.int32, device=keys.device)
    encoder.launch(keys, values, pages, refused, page_size)
    return pages, refused


@_encode_op.register_fake
def _(keys: Tensor, values: Tensor, handle: int) -> tuple[Tensor, Tensor]:
    encoder = _encoder_of(handle)
    n_bytes = page_bytes(encoder.tier, encoder.head_dim, keys.shape[-2])
    pages = keys.new_empty((*keys.shape[:-2], n_bytes), dtype=torch.uint8)
    return pages, keys.new_empty((), dtype=torch.int32)


@torch.library.custom_op("sphkv::encode_rows", mutates_args=("pool",))
def _encode_rows_op(
    pool: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    rows: Tensor,
    page_size: int,
    handle: int,
) -> Tensor:
    refused = torch.zeros((), dtype=torch.int32, device=keys.device)
    # A row of its own page: (1, n_tokens, head_dim), so that strides mean what they mean above.
    _encoder_of(handle).launch(keys[None], values[None], pool, refused, page_size, offsets, rows)
    return refused


@_encode_rows_op.register_fake
def _(
    pool: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    rows: Tensor,
    page_size: int,
    handle: int,
) -> Tensor:
    return keys.new_empty((), dtype=torch.int32)
