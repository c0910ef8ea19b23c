"""Digits of any radix in whole-bit words: 12 cells cost log2(12) bits, up to a word's rounding.

    word = sum_i digit_i prod_{j<i} radix_j,    bits(word) = ceil(log2 prod_j radix_j) <= 62

The digits of a row, in order, are cut into words so that the bits of all words are fewest; each
word loses less than one bit against the sum of the log2 radix_i. Source: the usual positional
system with mixed radices (Knuth, TAOCP 4.1); the cuts are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from sphkv_kernels.bit_fields import MAX_FIELD_BITS

MAX_WORD_BITS = 62
"""Words are int64: every product and sum stays below 2^63."""


@dataclass(frozen=True)
class RadixWord:
    """Digits [first, stop) of a row; weights: the place value of each, ascending."""

    first: int
    stop: int
    bits: int
    weights: tuple[int, ...]

    @property
    def fields(self) -> tuple[tuple[int, int], ...]:
        """``(number of fields, bits)``: 16-bit fields, low ones first, then what is left."""
        whole, rest = divmod(self.bits, MAX_FIELD_BITS)
        return ((whole, MAX_FIELD_BITS), (1, rest))


@lru_cache(maxsize=256)
def radix_words(radices: tuple[int, ...]) -> tuple[RadixWord, ...]:
    """The cut of digits with these radices (2 or more each) that needs the fewest bits in all."""
    if any(radix < 2 for radix in radices):
        raise ValueError(f"a digit needs a radix of 2 or more, got {min(radices)}")
    # fewest[stop]: bits of the first `stop` digits, and where the last of their words begins.
    fewest = [(0, 0)]
    for stop in range(1, len(radices) + 1):
        best = None
        product = 1
        for first in range(stop - 1, -1, -1):
            product *= radices[first]
            bits = (product - 1).bit_length()
            if bits > MAX_WORD_BITS:
                break
            total = fewest[first][0] + bits
            if best is None or total <= best[0]:  # of equal cuts the longest last word
                best = total, first
        if best is None:
            raise ValueError(f"a radix of {radices[stop - 1]} does not fit {MAX_WORD_BITS} bits")
        fewest.append(best)
    words = []
    stop = len(radices)
    while stop:
        first = fewest[stop][1]
        weights = tuple(accumulate((1, *radices[first : stop - 1]), mul))
        bits = (weights[-1] * radices[stop - 1] - 1).bit_length()
        words.append(RadixWord(first, stop, bits, weights))
        stop = first
    return tuple(reversed(words))


def word_bits(radices: tuple[int, ...]) -> int:
    """Bits of all words of a row."""
    return sum(word.bits for word in radix_words(radices))


def digit_fields(digits: Tensor, radices: tuple[int, ...]) -> list[tuple[Tensor, int]]:
    """Groups for `pack_fields` from ``(..., n_digits)`` integers, digit i below radices[i].

    Raises:
        ValueError: a digit outside its radix.
    """
    digits = digits.to(torch.int64)
    limits = torch.tensor(radices, dtype=torch.int64, device=digits.device)
    if digits.numel() and bool(((digits < 0) | (digits >= limits)).any()):
        raise ValueError("a digit lies outside its radix")
    groups: list[tuple[Tensor, int]] = []
    for word in radix_words(radices):
        weights = torch.tensor(word.weights, dtype=torch.int64, device=digits.device)
        value = (digits[..., word.first : word.stop] * weights).sum(-1, keepdim=True)
        (whole, width), (_, rest) = word.fields
        shifts = width * torch.arange(whole + 1, device=digits.device)
        parts = value >> shifts
        groups.append((parts[..., :whole] & ((1 << width) - 1), width))
        groups.append((parts[..., whole:], rest))
    return groups


def digit_layout(radices: tuple[int, ...]) -> list[tuple[int, int]]:
    """The ``(number of fields, bits)`` that `digit_fields` writes."""
    return [group for word in radix_words(radices) for group in word.fields]


def digits_of(groups: list[Tensor], radices: tuple[int, ...]) -> Tensor:
    """The inverse of `digit_fields`: ``(..., n_digits) int64``; any bits give digits in range."""
    limits = torch.tensor(radices, dtype=torch.int64, device=groups[0].device)
    found = []
    for index, word in enumerate(radix_words(radices)):
        whole, rest = groups[2 * index], groups[2 * index + 1]
        parts = torch.cat([whole, rest], dim=-1)
        shifts = MAX_FIELD_BITS * torch.arange(parts.shape[-1], device=parts.device)
        value = (parts << shifts).sum(-1, keepdim=True)
        weights = torch.tensor(word.weights, dtype=torch.int64, device=parts.device)
        found.append((value // weights) % limits[word.first : word.stop])
    return torch.cat(found, dim=-1)
