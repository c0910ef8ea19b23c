"""Encoding on the GPU: keys and values in the frame to the bytes of pages.

    page = [pack(K code, encode(keys))][pack(V code, encode(values))]

New tokens wait in the dense tail of a cache; when page_size of them are there, their page is sealed
with `encode` and copied into the pool. The codes are defined by float32 comparisons that every IEEE
device rounds alike (`sphkv_codebooks.encoder`), so the bytes are those of the CPU. Runs as torch
operations on the device of its input. Source: ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sphkv_kernels.pages import PAGE_SIZES, pack_keys, pack_values
from sphkv_kernels.tier import PageError, TierFormat
from sphkv_kernels.vectors import encode_vectors


def encode(tier: TierFormat, keys: Tensor, values: Tensor) -> Tensor:
    """Pages of one tier: ``(n_pages, page_bytes) uint8`` on the device of keys.

    keys, values: ``(n_pages, page_size, head_dim)`` floating, in the frame. Raises PageError on
    shapes that do not fit, ValueError on NaN, Inf or radii that the code cannot store.
    """
    if keys.ndim != 3 or keys.shape != values.shape or keys.device != values.device:
        raise PageError(
            f"keys {tuple(keys.shape)} on {keys.device} and values {tuple(values.shape)} on "
            f"{values.device} must both be (n_pages, page_size, head_dim) on one device"
        )
    if keys.shape[1] not in PAGE_SIZES:
        raise PageError(f"page_size {keys.shape[1]}: choose one of {PAGE_SIZES}")
    regions = (
        pack_keys(tier, encode_vectors(tier.key_format, keys)),
        pack_values(tier, encode_vectors(tier.value_format, values)),
    )
    return torch.cat(regions, dim=1)
