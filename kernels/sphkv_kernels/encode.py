"""Encoding on the GPU: keys and values to the bytes of pages, in one pass over them.

    page = [pack(K code, quantise(S k))][pack(V code, quantise(S v))]

New tokens wait in the dense tail of a cache; when page_size of them are there, their page is sealed
with `encode`. `encode_rows` writes tokens one by one into their pages instead. On a GPU one kernel
rotates (Hadamard), recurses, quantises and packs (`cuda/encode.cuh`): 16 coordinates a thread, read
once and written as codes. The codes are defined by float32 operations that every IEEE device
rounds alike (`sphkv_codebooks.encoder`), so the bytes are those of the CPU. On a CPU, for codes
without a native layout and for other sizes of a head, the same runs as torch operations; on a GPU
that no kernel is built for only where they are asked for. Source: ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sphkv_codebooks.rotation import Rotation
from sphkv_kernels.encode_launch import encoder_for
from sphkv_kernels.encode_source import has_encoder
from sphkv_kernels.launch import with_index
from sphkv_kernels.launch_arguments import FLOAT_TYPES, require
from sphkv_kernels.pages import pack_keys, pack_values, page_bytes
from sphkv_kernels.tier import PageError, TierFormat
from sphkv_kernels.variant import SUPPORTED_HEAD_DIMS
from sphkv_kernels.vectors import encode_vectors


class _Inputs(NamedTuple):
    keys: Tensor
    values: Tensor
    rotation: Rotation | None


def encode(
    tier: TierFormat,
    keys: Tensor,
    values: Tensor,
    *,
    rotation: Rotation | None = None,
    check: bool = True,
    uses_kernel: bool = True,
) -> Tensor:
    """Whole pages of one tier: ``(..., page_bytes) uint8`` on the device of keys.

    keys, values: ``(n_pages, page_size, head_dim)`` or ``(n_heads, n_pages, page_size, head_dim)``,
    floating, of one shape, strided as they are (a prefill's ``(n_tokens, n_kv_heads, head_dim)``
    viewed as pages is read in place). rotation: applied first, in float32; without it they are in
    the frame already. Hadamard rotations are part of the kernel, Haar ones a matrix product before.
    check: wait for the device and refuse what cannot be stored; without it (in a CUDA graph) such
    radii saturate and NaN gives arbitrary codes. uses_kernel: False for torch operations
    everywhere.

    Raises:
        PageError: shapes, dtypes or devices that do not fit.
        ValueError: NaN, Inf, radii that the code cannot store, or more than fp16 holds in a dense
            tier.
    """
    pages, refused = encode_flagged(tier, keys, values, rotation=rotation, uses_kernel=uses_kernel)
    if check and int(refused):
        _refuse(tier, keys, values, rotation)
    return pages


def prepare_encode(tier: TierFormat, head_dim: int, device: torch.device) -> None:
    """Load what `encode` of pages in the frame launches, if a kernel does it: the first call will
    not wait for NVRTC.

    Raises:
        PageError: codebooks too large for a launch, or a device that no kernel is built for.
        KernelBuildError: NVRTC is missing or refuses the encoder.
        KernelLaunchError: the driver refuses it.
    """
    if _has_kernel(tier, head_dim, device):
        encoder_for(tier, head_dim, None, False, with_index(device))


def _has_kernel(tier: TierFormat, head_dim: int, device: torch.device) -> bool:
    return device.type == "cuda" and head_dim in SUPPORTED_HEAD_DIMS and has_encoder(tier)


def encode_flagged(
    tier: TierFormat,
    keys: Tensor,
    values: Tensor,
    *,
    rotation: Rotation | None = None,
    uses_kernel: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `encode` without waiting for the device, and whether some vector cannot be stored.

    The flag, ``() int32`` on the device, is 0 where all can; radii too large saturate, and codes of
    NaN are arbitrary.  Where torch operations encode, such vectors are refused at once.
    uses_kernel: False for torch operations everywhere.

    Raises:
        PageError: as `encode`.
        ValueError: as `encode`, where torch operations encode.
    """
    _check_pair(keys, values)
    if keys.ndim not in (3, 4):
        raise PageError(
            f"keys {tuple(keys.shape)}: expected (n_pages, page_size, head_dim), with or without "
            "heads before it"
        )
    page_size, head_dim = keys.shape[-2:]
    n_bytes = page_bytes(tier, head_dim, page_size)  # refuses a foreign page_size or head_dim
    if not (uses_kernel and _has_kernel(tier, head_dim, keys.device)) or not keys.numel():
        pages = (
            _encode_torch(tier, *_rotated(keys, values, rotation))
            if keys.numel()
            else torch.empty((*keys.shape[:-2], n_bytes), dtype=torch.uint8, device=keys.device)
        )
        return pages, torch.zeros((), dtype=torch.int32, device=keys.device)
    inputs = _kernel_inputs(keys, values, rotation)
    encoder = encoder_for(tier, head_dim, inputs.rotation, False, keys.device)
    pages, refused = torch.ops.sphkv.encode(inputs.keys, inputs.values, encoder.handle)
    return torch.as_tensor(pages), torch.as_tensor(refused)


def encode_rows(
    tier: TierFormat,
    keys: Tensor,
    values: Tensor,
    pool: Tensor,
    page_offsets: Tensor,
    rows: Tensor,
    *,
    page_size: int,
    rotation: Rotation | None = None,
    check: bool = True,
) -> None:
    """Write single tokens into pages of the pool, in place; nothing else of the pages changes.

    keys, values: ``(n_tokens, head_dim)``, for example one new token of every sequence and KV head;
    pool: uint8; page_offsets: ``(n_tokens) int64``, first byte of each token's page; rows:
    ``(n_tokens) int32``, its row. Two tokens must not share a row. rotation as `encode`. check:
    also read page_offsets and rows back first, without it they are trusted. Needs a GPU and a tier
    with native layouts.

    Raises:
        PageError: shapes, dtypes or devices that do not fit, a tier that has no CUDA encoder, or a
            row outside the pool's pages (nothing is written).
        ValueError: NaN, Inf or radii that the code cannot store (they are written nevertheless).
    """
    _check_pair(keys, values)
    if keys.device.type != "cuda" or not has_encoder(tier):
        raise PageError(
            f"tier {tier.name!r} on {keys.device}: encode_rows needs a GPU and native layouts; "
            "keep new tokens in the dense tail and seal whole pages with encode"
        )
    if keys.ndim != 2:
        raise PageError(f"keys {tuple(keys.shape)}: expected (n_tokens, head_dim)")
    n_bytes = page_bytes(tier, keys.shape[1], page_size)
    per_token = (keys.shape[0],)
    require("pool", pool, (pool.numel(),), torch.uint8, keys.device, aligned=True)
    require("page_offsets", page_offsets, per_token, torch.int64, keys.device)
    require("rows", rows, per_token, torch.int32, keys.device)
    if not keys.numel():
        return
    if check:
        outside = (page_offsets < 0) | (page_offsets > pool.numel() - n_bytes)
        outside |= (page_offsets % 16 != 0) | (rows < 0) | (rows >= page_size)
        if bool(outside.any()):
            first = int(outside.nonzero()[0])
            raise PageError(
                f"token {first}: row {int(rows[first])} of a page at byte "
                f"{int(page_offsets[first])} is none of {page_size} rows of a page of {n_bytes} "
                f"bytes on a 16-byte boundary inside the pool of {pool.numel()} bytes"
            )
    inputs = _kernel_inputs(keys, values, rotation)
    encoder = encoder_for(tier, keys.shape[1], inputs.rotation, True, keys.device)
    refused = torch.ops.sphkv.encode_rows(
        pool, inputs.keys, inputs.values, page_offsets, rows, page_size, encoder.handle
    )
    if check and int(refused):
        _refuse(tier, keys[:, None], values[:, None], rotation)


def _check_pair(keys: Tensor, values: Tensor) -> None:
    if keys.shape != values.shape or keys.device != values.device or keys.dtype != values.dtype:
        raise PageError(
            f"keys {tuple(keys.shape)} {keys.dtype} on {keys.device} and values "
            f"{tuple(values.shape)} {values.dtype} on {values.device} must both be of one shape, "
            "dtype and device"
        )
    if not keys.dtype.is_floating_point:
        raise PageError(f"keys are {keys.dtype}; encode takes floating point vectors")


def _rotated(keys: Tensor, values: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
    if rotation is None:
        return keys, values
    wide = [x.to(torch.float32) for x in (keys, values)]
    return rotation.apply(wide[0]), rotation.apply(wide[1])


def _kernel_inputs(keys: Tensor, values: Tensor, rotation: Rotation | None) -> _Inputs:
    """Aligned rows of a type that the kernel reads, and the rotation that is left for it."""
    if rotation is not None and rotation.kind != "hadamard":
        keys, values = _rotated(keys, values, rotation)
        rotation = None
    if keys.dtype not in FLOAT_TYPES:
        keys, values = keys.to(torch.float32), values.to(torch.float32)
    return _Inputs(_aligned(keys), _aligned(values), rotation)


def _aligned(x: Tensor) -> Tensor:
    """Rows that 16-byte loads can read, without a copy where they are so already."""
    step = 16 // x.element_size()
    fits = x.stride(-1) == 1 and all(s % step == 0 for s in x.stride()[:-1])
    return x if fits and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _encode_torch(tier: TierFormat, keys: Tensor, values: Tensor) -> Tensor:
    leading = keys.shape[:-2]
    regions = [
        pack(tier, encode_vectors(region, x.reshape(-1, *x.shape[-2:])))
        for pack, region, x in (
            (pack_keys, tier.key_format, keys),
            (pack_values, tier.value_format, values),
        )
    ]
    return torch.cat(regions, dim=1).reshape(*leading, -1)


def _refuse(tier: TierFormat, keys: Tensor, values: Tensor, rotation: Rotation | None) -> None:
    """Raise the error that the torch encoder has for these vectors: it names what is wrong."""
    keys, values = _rotated(keys, values, rotation)
    encode_vectors(tier.key_format, keys)
    encode_vectors(tier.value_format, values)
    raise ValueError(f"tier {tier.name!r}: a vector holds NaN or Inf, or is too large to store")
