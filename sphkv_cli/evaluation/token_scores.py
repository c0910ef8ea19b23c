"""Two runs of one model compared position by position, over the whole vocabulary.

    kl_t = KL(p_t || q_t),   p the dense run's next-token distribution, q the coded run's
    nll_t = -log p_t(x_t+1)  of both,   agree_t = [argmax p_t = argmax q_t]

Logits are made from final hidden states a few positions at a time: memory is bounded by
chunk x vocabulary whatever the document's length.  Source: the usual definitions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TokenScores:
    """positions (n_scored) int64; kl, nll_dense, nll_coded (n_scored) nats; agree (n_scored)."""

    positions: npt.NDArray[np.int64]
    kl: Float
    nll_dense: Float
    nll_coded: Float
    agree: npt.NDArray[np.bool_]


def score_tokens(
    head: Callable[[Tensor], Tensor],
    dense_hidden: Tensor,
    coded_hidden: Sequence[Tensor],
    token_ids: Tensor,
    positions: range,
    *,
    chunk: int = 128,
) -> list[TokenScores]:
    """Compare runs with the dense one at `positions`; each must have a token after it.

    Args:
        head: final hidden states (n, hidden_dim) to logits (n, vocabulary).
        dense_hidden: (n_tokens, hidden_dim); coded_hidden: the same of every run to compare.
        token_ids: (n_tokens) int64.
        chunk: positions whose logits are held at a time.
    """
    n_scored, n_runs = len(positions), len(coded_hidden)
    # Made first: small results that outlive the big logits between them would fragment the heap.
    kl, nll = np.empty((n_runs, n_scored)), np.empty((n_runs, n_scored))
    agree, nll_dense = np.empty((n_runs, n_scored), dtype=np.bool_), np.empty(n_scored)
    for start in range(positions.start, positions.stop, chunk):
        rows = slice(start, min(start + chunk, positions.stop))
        place = slice(rows.start - positions.start, rows.stop - positions.start)
        following = token_ids[rows.start + 1 : rows.stop + 1, None]
        dense = torch.log_softmax(head(dense_hidden[rows]).float(), dim=-1)
        probabilities = dense.exp()
        nll_dense[place] = _array(-dense.gather(1, following)[:, 0])
        likeliest = dense.argmax(dim=-1)
        for run, hidden in enumerate(coded_hidden):
            coded = torch.log_softmax(head(hidden[rows]).float(), dim=-1)
            nll[run, place] = _array(-coded.gather(1, following)[:, 0])
            agree[run, place] = _array(coded.argmax(dim=-1) == likeliest)
            # Each term is a difference of nearly equal logarithms times p.
            terms = torch.sub(dense, coded, out=coded).mul_(probabilities)
            kl[run, place] = _array(terms.sum(dim=-1, dtype=torch.float64))
    where = np.arange(positions.start, positions.stop, dtype=np.int64)
    return [TokenScores(where, kl[i], nll_dense, nll[i], agree[i]) for i in range(n_runs)]


def _array(x: Tensor) -> npt.NDArray[np.generic]:
    array: npt.NDArray[np.generic] = x.cpu().numpy()
    return array
