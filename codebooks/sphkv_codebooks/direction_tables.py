"""cos and sin of a book's centroids as tensors, made once per book, device and dtype."""

from __future__ import annotations

from functools import lru_cache

import torch

from sphkv_codebooks.codebook import Codebook


@lru_cache(maxsize=1024)
def complex_table(book: Codebook, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """cos + i sin of the centroids, parts in `dtype`."""
    cosine, sine = _tables(book, device, dtype)
    return torch.complex(cosine, sine)


@lru_cache(maxsize=1024)
def _tables(
    book: Codebook, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    cosine, sine = (torch.tensor(table.tolist(), dtype=torch.float64) for table in book.cos_sin())
    return cosine.to(device, dtype), sine.to(device, dtype)


def cos_sin_of(
    book: Codebook, codes: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the coded angles, same shape as codes."""
    cosine, sine = _tables(book, codes.device, dtype)
    index = codes.reshape(-1).long()
    return (
        torch.index_select(cosine, 0, index).reshape(codes.shape),
        torch.index_select(sine, 0, index).reshape(codes.shape),
    )
