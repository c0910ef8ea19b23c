"""Query-key balancing: the same second moment for keys and queries, logits unchanged.

    k' = A k,  q' = A^-T q,      A Sigma_k A^T = A^-T Sigma_q A^-1

A code spreads its error evenly over the coordinates of k'; where queries are long that hurts most,
so keys are stretched there until both sides look alike.  With A symmetric and positive, M = A^2
solves M Sigma_k M = Sigma_q, the geometric mean of Sigma_k^-1 and Sigma_q:

    M = Sigma_k^-1/2 (Sigma_k^1/2 Sigma_q Sigma_k^1/2)^1/2 Sigma_k^-1/2

Ours; the geometric mean of matrices is Pusz and Woronowicz's (1975).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sphkv_codebooks.errors import CodeError

FloatArray = npt.NDArray[np.float64]

RIDGE = 1e-2
"""Of the mean eigenvalue, added to every one: directions that calibration hardly saw stay as they
are, and the condition of A stays below (1 + 1 / RIDGE)^(1/2) of it."""


def key_query_balancing(
    key_moment: FloatArray, query_moment: FloatArray, *, diagonal: bool = False
) -> FloatArray:
    """A of each head, (n_heads, head_dim, head_dim), symmetric, positive, float16-valued.

    Args:
        key_moment: E[(k - c)(k - c)^T] per KV head, (n_heads, head_dim, head_dim).
        query_moment: E[q q^T], mean over the query heads of the group.
        diagonal: only scale the two coordinates of each RoPE pair (j, j + head_dim / 2) alike, by
            their mean moments: such an A does not depend on how far the pairs are turned.

    Raises:
        CodeError: a moment that is not finite, or not positive anywhere.
    """
    for name, moment in (("key", key_moment), ("query", query_moment)):
        if not np.isfinite(moment).all() or (np.trace(moment, axis1=1, axis2=2) <= 0).any():
            raise CodeError(f"the {name} moment of some head is not finite and positive")
    keys, queries = _ridged(key_moment), _ridged(query_moment)
    if diagonal:
        spectra = [np.diagonal(moment, axis1=1, axis2=2) for moment in (queries, keys)]
        halves = [sum(np.split(spectrum, 2, axis=-1)) for spectrum in spectra]
        scale = np.tile((halves[0] / halves[1]) ** 0.25, 2)
        balancing = scale[:, :, None] * np.eye(keys.shape[-1])
    else:
        root, inverse_root = _power(keys, 0.5), _power(keys, -0.5)
        mean = inverse_root @ _power(root @ queries @ root, 0.5) @ inverse_root
        balancing = _power(mean, 0.5)
    # A common factor changes nothing but the size of the stored norms; unit mean suits float16.
    balancing /= np.abs(np.diagonal(balancing, axis1=1, axis2=2)).mean(axis=1)[:, None, None]
    rounded: FloatArray = balancing.astype(np.float16).astype(np.float64)
    return rounded


def balancing_bytes(balancing: FloatArray) -> int:
    """Bytes of the matrices (..., head_dim, head_dim) in float16: nothing for the identity, the
    diagonal of a diagonal one, else a triangle (they are symmetric)."""
    head_dim = balancing.shape[-1]
    identity = np.eye(head_dim)
    total = 0
    for matrix in balancing.reshape(-1, head_dim, head_dim):
        if (matrix == identity).all():
            continue
        is_diagonal = not (matrix * (1 - identity)).any()
        is_symmetric = (matrix == matrix.T).all()
        triangle = head_dim * (head_dim + 1) // 2 if is_symmetric else head_dim**2
        total += 2 * (head_dim if is_diagonal else triangle)
    return total


def _ridged(moment: FloatArray) -> FloatArray:
    head_dim = moment.shape[-1]
    level = np.trace(moment, axis1=1, axis2=2) / head_dim
    ridged: FloatArray = moment + (RIDGE * level)[:, None, None] * np.eye(head_dim)
    return (ridged + ridged.swapaxes(-1, -2)) / 2


def _power(matrices: FloatArray, exponent: float) -> FloatArray:
    """Symmetric positive matrices to a power."""
    values, vectors = np.linalg.eigh((matrices + matrices.swapaxes(-1, -2)) / 2)
    powered = np.maximum(values, np.finfo(np.float64).tiny) ** exponent
    product: FloatArray = (vectors * powered[:, None, :]) @ vectors.swapaxes(-1, -2)
    return product
