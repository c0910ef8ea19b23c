"""From an estimator's score to expected future damage: one monotone table per (layer, KV head).

    u(token) = E[true future u | score of the token],   u in {key, value, drop}

fitted on the `fit` documents by isotonic regression (pool adjacent violators): true future damage
is measured with the horizon's queries, the score sees the context alone.  A token that the window
never looked at thereby costs what such tokens turned out to cost, instead of nothing: without it
the codes and names that a text refers back to are dropped because nobody has asked for them yet.

Each pooled block is smoothed by one pseudo token of the head's geometric mean damage, since the
damage of rarely needed tokens has a heavy tail that a few hundred samples miss.  Between the
blocks' mean log-scores the table is linear in logs, so that equal values do not hide the order of
the scores; below the first mean it is constant, above the largest score of the fit it grows with
the score.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

Float = NDArray[np.float64]

QUANTITIES = ("key", "value", "drop")
_LEAST_LOG = -300.0


@dataclass(frozen=True)
class CalibrationTables:
    """Knots of all tables, one after the other.

    starts: (n_layers, n_kv_heads, 3, 2) int64, first and past-the-last knot of each table, the
        third axis as `QUANTITIES`.
    log_scores, log_values: (n_knots) float64, natural logarithms; scores rise inside a table,
        values do not fall.
    """

    starts: NDArray[np.int64]
    log_scores: Float
    log_values: Float

    def __post_init__(self) -> None:
        if self.starts.ndim != 4 or self.starts.shape[2:] != (len(QUANTITIES), 2):
            raise ValueError(f"starts: shape {self.starts.shape}, must be (.., .., 3, 2)")
        if self.log_scores.shape != self.log_values.shape or self.log_scores.ndim != 1:
            raise ValueError("log_scores and log_values must be of one length")

    def expected(self, scores: Float, quantity: str) -> Float:
        """Expected future damage.

        Args:
            scores: (n_layers, n_kv_heads, n_tokens), >= 0.
            quantity: one of `QUANTITIES`.
        """
        index = QUANTITIES.index(quantity)
        out = np.empty(scores.shape)
        for layer, kv_head in np.ndindex(scores.shape[:2]):
            first, last = self.starts[layer, kv_head, index]
            knots, values = self.log_scores[first:last], self.log_values[first:last]
            logs = _log(scores[layer, kv_head])
            beyond = np.maximum(logs - knots[-1], 0.0)
            out[layer, kv_head] = np.exp(np.interp(logs, knots, values) + beyond)
        return out


def fit_tables(scores: Sequence[Float], futures: Sequence[dict[str, Float]]) -> CalibrationTables:
    """Fit all tables.

    Args:
        scores: per fit document (n_layers, n_kv_heads, n_context); lengths may differ.
        futures: per fit document, for each of `QUANTITIES`, true future damage of that shape.
    """
    n_layers, n_kv_heads = scores[0].shape[:2]
    starts = np.zeros((n_layers, n_kv_heads, len(QUANTITIES), 2), dtype=np.int64)
    knots: list[Float] = []
    values: list[Float] = []
    n_knots = 0
    for layer, kv_head in np.ndindex(n_layers, n_kv_heads):
        raw = np.concatenate([score[layer, kv_head] for score in scores])
        # A score of zero is out of every later query's reach, not a small need.
        order = np.argsort(raw, kind="stable")[np.count_nonzero(raw == 0) :]
        x = _log(raw)
        for index, quantity in enumerate(QUANTITIES):
            y = np.concatenate([future[quantity][layer, kv_head] for future in futures])
            table = _monotone_table(x[order], y[order])
            starts[layer, kv_head, index] = n_knots, n_knots + table[0].size
            n_knots += table[0].size
            knots.append(table[0])
            values.append(table[1])
    return CalibrationTables(starts, np.concatenate(knots), np.concatenate(values))


def _monotone_table(log_scores: Float, damage: Float) -> tuple[Float, Float]:
    """Knots (mean log-score, log of smoothed mean damage) of one table; scores sorted."""
    if not log_scores.size:
        return np.zeros(1), np.full(1, _LEAST_LOG)
    unique, first, counts = np.unique(log_scores, return_index=True, return_counts=True)
    means = np.add.reduceat(damage, first) / counts
    fitted = isotonic_regression(means, weights=counts.astype(np.float64))
    edges = fitted.blocks[:-1]
    tokens = np.add.reduceat(counts, edges)
    centres = np.add.reduceat(unique * counts, edges) / tokens
    pseudo = np.exp(_log(damage[damage > 0]).mean()) if damage.any() else 0.0
    smoothed = (fitted.x[edges] * tokens + pseudo) / (tokens + 1)
    # One pseudo token weighs more in a small block: the order could turn where blocks are close.
    values = np.maximum.accumulate(_log(smoothed))
    if unique[-1] > centres[-1]:
        centres, values = np.append(centres, unique[-1]), np.append(values, values[-1])
    return centres, values


def _log(values: Float) -> Float:
    return np.log(np.maximum(values, np.exp(_LEAST_LOG)))
