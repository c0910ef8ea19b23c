"""The Lagrange multiplier of a byte budget, from a histogram over log-rates.

Every item buys its hull segments in order of falling rate; the multiplier lambda is the rate of the
first segment that no longer fits when the segments of all items are bought in that order:

    lambda = max { r : sum of the bytes of segments with rate >= r exceeds what is left }

The histogram's bins are the leading bits of the rates as IEEE doubles (exponent and five bits of
mantissa), which are monotone in the rate: 1/32 relative width over the whole range of doubles and
no logarithm.  Only the segments of the one critical bin are sorted.  Source: ours.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

_SHIFT = 47  # 64 - 1 sign - 11 exponent - 5 mantissa bits
_N_BINS = (0x7FF0_0000_0000_0000 >> _SHIFT) + 1  # the last bin is +inf


@dataclass(frozen=True)
class Cut:
    """Where the budget cuts the segments of one bin, sorted by falling rate.

    rate: the multiplier.
    items: (n) int64, rising, those of which some segment of the bin fits; levels: (n) int8, how
        many segments of the item's whole hull are then taken.
    last_item: of the last segment that fits, -1 where none does.
    """

    rate: float
    items: NDArray[np.int64]
    levels: NDArray[np.int8]
    last_item: int


@dataclass(frozen=True)
class Segments:
    """Hull segments of one bin: item int64, step int8 (the k of rate_k), rate, bytes; (n) each."""

    items: NDArray[np.int64]
    steps: NDArray[np.int8]
    rates: Float
    sizes: Float

    @staticmethod
    def of_bin(items: NDArray[np.int64], rates: Float, sizes: Float, bin_index: int) -> "Segments":
        """The segments of one bin.

        Args:
            items: (n_items) numbers.
            rates: (n_options - 1, n_items); sizes: (n_options - 1, n_items or 1) bytes.
            bin_index: as `RateHistogram.critical_bin` gave it.
        """
        found = []
        for step, (rate, in_bin) in enumerate(zip(rates, _bins(rates) == bin_index, strict=True)):
            hit = np.flatnonzero(in_bin)
            size = sizes[step, 0] if sizes.shape[1] == 1 else sizes[step, hit]
            found.append(
                Segments(
                    items[hit],
                    np.full(hit.size, step, dtype=np.int8),
                    rate[hit],
                    np.broadcast_to(size, hit.shape),
                )
            )
        return Segments.joined(found)

    @staticmethod
    def joined(parts: Sequence["Segments"]) -> "Segments":
        """One after the other."""
        if not parts:
            empty = np.empty(0)
            return Segments(empty.astype(np.int64), empty.astype(np.int8), empty, empty)
        return Segments(
            np.concatenate([part.items for part in parts]),
            np.concatenate([part.steps for part in parts]),
            np.concatenate([part.rates for part in parts]),
            np.concatenate([part.sizes for part in parts]),
        )


class RateHistogram:
    """Bytes of hull segments by rate; those of bin 0 (subnormal doubles: no gain) are left out."""

    def __init__(self) -> None:
        self._bytes = np.zeros(_N_BINS)

    @staticmethod
    def merged(parts: Iterable["RateHistogram"]) -> "RateHistogram":
        """The segments of all parts."""
        total = RateHistogram()
        for part in parts:
            total._bytes += part._bytes
        return total

    def add(self, rates: Float, segment_bytes: Float) -> NDArray[np.int64]:
        """Add segments: rates and bytes (n_options - 1, n_items); bytes may be (…, 1).

        Returns the bin of each: (n_options - 1, n_items).
        """
        bins = _bins(rates)
        sizes = np.broadcast_to(segment_bytes, rates.shape)
        self._bytes += np.bincount(bins.ravel(), weights=sizes.ravel(), minlength=_N_BINS)
        self._bytes[0] = 0.0
        return bins

    def critical_bin(self, left_bytes: float) -> tuple[int, float]:
        """The bin in which `left_bytes` run out, and the bytes of all bins above it.

        Returns (0, total) when they never do.
        """
        from_top = np.cumsum(self._bytes[::-1])
        over = int(np.searchsorted(from_top, left_bytes, side="right"))
        if over == _N_BINS:
            return 0, float(from_top[-1])
        return _N_BINS - 1 - over, float(from_top[over] - self._bytes[_N_BINS - 1 - over])


def cut_segments(segments: Segments, left_bytes: float) -> Cut:
    """Sort the segments of the critical bin and cut them where `left_bytes` run out."""
    order = np.lexsort((segments.steps, segments.items, -segments.rates))
    taken_bytes = np.cumsum(segments.sizes[order])
    fits = int(np.searchsorted(taken_bytes, left_bytes, side="right"))
    rate = float(segments.rates[order[min(fits, order.size - 1)]])
    taken = order[:fits]
    last_item = int(segments.items[taken[-1]]) if fits else -1
    # Of every item the highest step: rates fall along the steps, so those below it are taken too.
    taken = taken[np.lexsort((segments.steps[taken], segments.items[taken]))]
    items = segments.items[taken]
    is_last = np.append(items[1:] != items[:-1], True)[: items.size]
    levels = segments.steps[taken][is_last] + np.int8(1)
    return Cut(rate, items[is_last], levels, last_item)


def _bins(rates: Float) -> NDArray[np.int64]:
    return np.ascontiguousarray(rates).view(np.int64) >> _SHIFT
