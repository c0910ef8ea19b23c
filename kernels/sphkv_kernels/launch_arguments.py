"""What the launchers ask of the tensors that they are given.  Source: ours."""

from __future__ import annotations

import torch
from torch import Tensor

from sphkv_kernels.tier import PageError

FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types of vectors that the kernels read, as their parameter structs number them."""


def require(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    whole: bool = True,
    aligned: bool = False,
) -> None:
    """Refuse a tensor of another shape, dtype or device, strided (whole: at all), or (aligned) one
    that does not start at a multiple of 16 bytes: PageError."""
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or tensor.device != device:
        raise PageError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, expected "
            f"{tuple(shape)} {dtype} on {device}"
        )
    if not (tensor.is_contiguous() if whole else tensor.stride(-1) == 1):
        raise PageError(f"{name} is not contiguous; call .contiguous()")
    if aligned:
        require_aligned(name, tensor)


def require_aligned(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that does not start at a multiple of 16 bytes: PageError."""
    if tensor.data_ptr() % 16:
        raise PageError(f"{name} does not start at a multiple of 16 bytes; call .clone()")
