"""The lower convex hull of every item's (bytes, cost) options, as rates of exchange.

Option j of an item takes b_j bytes and costs c_j, b_0 <= ... <= b_{m-1}.  Between options k and
k + 1 the lower convex hull falls by

    rate_k = min_{a <= k} max_{b > k} (c_a - c_b) / (b_b - b_a)        (cost per byte, >= 0)

which is the min-max form of isotonic regression (pool adjacent violators) of the raw slopes; the
rates never rise with k, and the corners of the hull are the options where they fall.  So the best
option of an item at the price lambda is the number of its rates above lambda.  Costs are first
replaced by their running minimum: an option with more bytes can always pretend to be a cheaper one.
Source: ours; the min-max form is Barlow et al., Statistical Inference under Order Restrictions.
"""

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]


def hull_rates(costs: Float, option_bytes: Float) -> Float:
    """Rates of the lower convex hulls.

    Args:
        costs: (n_options, n_items), options in order of non-decreasing bytes, costs already their
            own running minimum over the options.
        option_bytes: (n_options, n_items) or (n_options, 1).

    Returns:
        (n_options - 1, n_items), non-increasing along the first axis, +inf where a cheaper option
        takes no further byte.
    """
    n_options, n_items = costs.shape
    rates = np.full((n_options - 1, n_items), np.inf)
    steepest = np.empty(n_items)
    chord = np.empty(n_items)
    for start in range(n_options - 1):
        steepest.fill(0.0)
        for stop in range(n_options - 1, start, -1):
            span = option_bytes[stop] - option_bytes[start]
            np.subtract(costs[start], costs[stop], out=chord)
            # Divided, not multiplied by the reciprocal: an item's rates must come out the same
            # bits alone and in company, since the solver looks for them in their bin again.
            if span.size == 1 and span[0] > 0:
                chord /= span[0]
            else:
                # No further byte: free to take, whatever it gains.
                chord = np.divide(chord, span, out=np.full(n_items, np.inf), where=span > 0)
            np.maximum(steepest, chord, out=steepest)
            np.minimum(rates[stop - 1], steepest, out=rates[stop - 1])
    return rates


def running_minimum(costs: Float) -> Float:
    """Running minimum over the first axis, in place (numpy's accumulate is ten times slower)."""
    for option in range(1, costs.shape[0]):
        np.minimum(costs[option - 1], costs[option], out=costs[option])
    return costs
