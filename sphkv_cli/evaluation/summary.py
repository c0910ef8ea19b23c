"""From scores per position to a row per coding."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from sphkv_cli.evaluation.intervals import Interval, geometric_interval, mean_interval
from sphkv_cli.evaluation.result import DocumentScore, PositionBin, Row
from sphkv_cli.evaluation.token_scores import TokenScores


def summarise(
    name: str,
    documents: Sequence[DocumentScore],
    scores: Sequence[TokenScores],
    *,
    is_ours: bool,
    n_seeds: int = 1,
    family: str = "",
) -> Row:
    """One row over documents; scores: of every document and rotation seed, in any order.

    family: of the row, empty where it is alone.
    """
    log_ratio = [
        math.log(document.perplexity_coded / document.perplexity_dense) for document in documents
    ]
    ratio = mean_interval(log_ratio)
    return Row(
        name=name,
        family=family or name,
        is_ours=is_ours,
        n_seeds=n_seeds,
        code_rate=float(np.mean([document.code_rate for document in documents])),
        coded_laid_out_rate=float(
            np.mean([document.coded_laid_out_rate for document in documents])
        ),
        laid_out_rate=float(np.mean([document.laid_out_rate for document in documents])),
        kl=mean_interval([document.kl for document in documents]),
        kl_geometric=geometric_interval([document.kl for document in documents]),
        kl_p99=float(np.quantile(np.concatenate([score.kl for score in scores]), 0.99)),
        perplexity_ratio=Interval(math.exp(ratio.mean), math.exp(ratio.low), math.exp(ratio.high)),
        top1=mean_interval([document.top1 for document in documents]),
        by_position=position_bins(scores),
        documents=tuple(documents),
    )


def mean_over_seeds(scores: Sequence[DocumentScore]) -> DocumentScore:
    """One document under one code with several rotations: the mean of each quantity.

    Perplexities by their geometric mean; seconds and keys kept dense too are those of one run.
    """

    def mean(quantity: Callable[[DocumentScore], float]) -> float:
        return float(np.mean([quantity(score) for score in scores]))

    return replace(
        scores[0],
        kl=mean(lambda score: score.kl),
        kl_p99=mean(lambda score: score.kl_p99),
        perplexity_coded=math.exp(mean(lambda score: math.log(score.perplexity_coded))),
        top1=mean(lambda score: score.top1),
        laid_out_rate=mean(lambda score: score.laid_out_rate),
        seconds=mean(lambda score: score.seconds),
    )


def position_bins(scores: Sequence[TokenScores]) -> tuple[PositionBin, ...]:
    """KL by position; bins of 32, 64, 128 ... tokens from the first scored one on."""
    first = min(int(score.positions[0]) for score in scores)
    last = max(int(score.positions[-1]) for score in scores)
    bins = []
    width = 32
    while first <= last:
        stop = min(first + width, last + 1)
        means = [
            float(score.kl[inside].mean())
            for score in scores
            if (inside := (score.positions >= first) & (score.positions < stop)).any()
        ]
        bins.append(PositionBin(first, stop - 1, float(np.mean(means))))
        first, width = stop, 2 * width
    return tuple(bins)
