"""Means over documents with Student's t confidence intervals.

    mean +- t_{.975, n-1} s / sqrt(n)      of x_1..x_n, one number per document

Positions inside a document are not independent; documents are the sample.  Geometric means are
means of logarithms.  Source: textbook.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
# The mean KL of a float32 model with itself lies within some 1e-9 of 0, below it too: of smaller
# values only the rounding would be compared.
SMALLEST_KL = 1e-8


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence limits; both are NaN with a single document."""

    mean: float
    low: float
    high: float


def mean_interval(samples: Sequence[float]) -> Interval:
    """Arithmetic mean over documents."""
    values = np.asarray(samples, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1))
    half /= math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def geometric_interval(samples: Sequence[float]) -> Interval:
    """Geometric mean over documents; what is below SMALLEST_KL counts as that."""
    logs = mean_interval([math.log(max(x, SMALLEST_KL)) for x in samples])
    return Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high))
