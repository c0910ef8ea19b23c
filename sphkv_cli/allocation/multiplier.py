"""The Lagrange multiplier of a byte budget, from a histogram over log-rates.

Every item buys its hull segments in order of falling rate; the multiplier lambda is the rate of the
first segment that no longer fits when the segments of all items are bought in that order:

    lambda = max { r : sum of the bytes of segments with rate >= r exceeds what is left }

The histogram's bins are the leading bits of the rates as IEEE doubles (exponent and five bits of
mantissa), which are monotone in the rate: 1/32 relative width over the whole range of doubles and
no logarithm.  Only the segments of the one critical bin are sorted.  Source: ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

_SHIFT = 47  # 64 - 1 sign - 11 exponent - 5 mantissa bits
_N_BINS = (0x7FF0_0000_0000_0000 >> _SHIFT) + 1  # the last bin is +inf
NO_GAIN = float(np.int64((1 << _SHIFT) - 1).view(np.float64))
"""The largest rate of bin 0 (a subnormal double): a segment at or below it gains nothing."""


@dataclass(frozen=True)
class Cut:
    """Where the budget cuts the segments of all items, sorted by falling rate.

    rate: the multiplier; NO_GAIN when every segment with a gain fits.
    tied_items: (n) int64, item of each segment of exactly that rate that still fits, one entry per
        segment.
    """

    rate: float
    tied_items: NDArray[np.int64]


class RateHistogram:
    """Bytes of hull segments by rate; those without a gain (at most NO_GAIN) are left out."""

    def __init__(self) -> None:
        self._bytes = np.zeros(_N_BINS)

    def add(self, rates: Float, segment_bytes: Float) -> None:
        """Add segments: rates and bytes (n_options - 1, n_items); bytes may be (…, 1)."""
        for rate, size in zip(rates, segment_bytes, strict=True):
            if size.size == 1:
                counts = np.bincount(_bins(rate), minlength=_N_BINS)
                self._bytes += counts * float(size[0])
            else:
                self._bytes += np.bincount(_bins(rate), weights=size, minlength=_N_BINS)
        self._bytes[0] = 0.0

    def critical_bin(self, left_bytes: float) -> tuple[int, float]:
        """The bin in which `left_bytes` run out, and the bytes of all bins above it.

        Returns (0, total) when they never do.
        """
        from_top = np.cumsum(self._bytes[::-1])
        over = int(np.searchsorted(from_top, left_bytes, side="right"))
        if over == _N_BINS:
            return 0, float(from_top[-1])
        return _N_BINS - 1 - over, float(from_top[over] - self._bytes[_N_BINS - 1 - over])


def cut_in_bin(
    blocks: Iterator[tuple[int, Float, Float]], bin_index: int, left_bytes: float
) -> Cut:
    """Sort the segments of one bin and cut them where `left_bytes` run out.

    Args:
        blocks: (first item, rates (n_options - 1, n_items), segment bytes (n_options - 1, n_items
            or 1)) of all items.
        bin_index: as `RateHistogram.critical_bin` gave it; must be above 0.
        left_bytes: what the segments of this bin may take.
    """
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], Float, Float]] = []
    for first, rates, sizes in blocks:
        sizes = np.broadcast_to(sizes, rates.shape)
        for k in range(rates.shape[0]):
            hit = np.flatnonzero(_bins(rates[k]) == bin_index)
            if hit.size:
                step = np.full(hit.size, k, dtype=np.int64)
                found.append((hit + first, step, rates[k, hit], sizes[k, hit]))
    items, steps, rate, size = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((steps, items, -rate))
    items, rate, size = items[order], rate[order], size[order]
    fits = int(np.searchsorted(np.cumsum(size), left_bytes, side="right"))
    critical = float(rate[min(fits, rate.size - 1)])
    tied = items[:fits][rate[:fits] == critical]
    return Cut(critical, tied)


def _bins(rates: Float) -> NDArray[np.int64]:
    return np.ascontiguousarray(rates).view(np.int64) >> _SHIFT
