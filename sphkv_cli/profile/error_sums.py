"""Running statistics of errors, so that memory does not grow with documents or queries.

Sums give the rms, a histogram of magnitudes the 99th percentile: 64 bins per power of two (the six
leading mantissa bits of float32), hence a percentile known to 1.6 %.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

_MANTISSA_BITS = 6
_SHIFT = 23 - _MANTISSA_BITS
_N_BINS = 255 << _MANTISSA_BITS


@dataclass
class MagnitudeSums:
    """|x| of many numbers, per head: count, sum of squares, maximum, histogram."""

    n_heads: int
    count: Tensor = field(init=False)
    sum_sq: Tensor = field(init=False)
    largest: Tensor = field(init=False)
    histogram: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.count = torch.zeros(self.n_heads, dtype=torch.float64)
        self.sum_sq = torch.zeros(self.n_heads, dtype=torch.float64)
        self.largest = torch.zeros(self.n_heads, dtype=torch.float64)
        self.histogram = torch.zeros((self.n_heads, _N_BINS), dtype=torch.int64)

    def add(self, head: int, x: Tensor) -> None:
        """Take in every entry of x (finite, any shape) for one head."""
        if x.numel() == 0:
            return
        self.count[head] += x.numel()
        self.sum_sq[head] += torch.linalg.vector_norm(x).square()
        self.largest[head] = torch.maximum(self.largest[head], x.abs().max())
        bins = (x.to(torch.float32).abs().flatten().view(torch.int32)) >> _SHIFT
        self.histogram[head] += torch.bincount(bins, minlength=_N_BINS)

    def rms(self) -> Tensor:
        """``(n_heads)``; NaN without entries."""
        return (self.sum_sq / self.count).sqrt()

    def maximum(self) -> Tensor:
        """``(n_heads)``; NaN without entries."""
        return torch.where(self.count > 0, self.largest, torch.nan)

    def percentile(self, fraction: float) -> Tensor:
        """Upper edge of the bin up to which `fraction` of the entries lie, at most the maximum."""
        reached = self.histogram.cumsum(1) >= (fraction * self.count).ceil()[:, None]
        first = reached.to(torch.int8).argmax(1)
        edges = ((first + 1) << _SHIFT).to(torch.int32).view(torch.float32).to(torch.float64)
        return torch.where(self.count > 0, torch.minimum(edges, self.largest), torch.nan)
