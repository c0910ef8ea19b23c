"""Needle: one code in a long text, found or not by where it lies and how long the text is.

    accuracy[length, depth] = mean over prompts of the digits of the one code that come back

The same prompts and scores as `copy_back.py`, one statement each, placed instead of drawn.
Source: the needle-in-a-haystack grid as it is commonly drawn; wording ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sphkv_cli.evaluation.coding import KeyValueCoding
from sphkv_cli.evaluation.copy_back import CodingOf, RecallScore, copy_back_recall
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.protocol import ReadProtocol
from sphkv_cli.evaluation.recall_prompts import Encode, PromptShape, RecallPrompt, recall_prompt
from sphkv_cli.progress import Progress

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class NeedleGrid:
    """One coding: digit accuracy and exact recall, [length][depth], means over prompts."""

    coding: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    digit_accuracy: tuple[tuple[float, ...], ...]
    exact: tuple[tuple[float, ...], ...]
    laid_out_rate: float

    @property
    def mean_accuracy(self) -> float:
        """Over all cells."""
        return float(np.mean(self.digit_accuracy))


def needle_prompts(
    encode: Encode,
    filler: Sequence[int],
    shape: PromptShape,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    n_prompts: int = 2,
    seed: int = 42,
) -> tuple[RecallPrompt, ...]:
    """n_prompts for each (length, depth), lengths first.

    Every cell draws from a generator of its own, so that a grid with more cells repeats the others.

    Raises:
        SphkvError: as `recall_prompt`.
    """
    found = []
    for length in lengths:
        for depth in depths:
            rng = np.random.default_rng([seed, length, round(1000 * depth)])
            cell = replace(shape, n_context=length, n_keys=1)
            found += [
                recall_prompt(
                    f"{length} tokens, depth {depth:g}", encode, filler, cell, rng, [depth]
                )
                for _ in range(n_prompts)
            ]
    return tuple(found)


def needle_grid(
    model: JudgedModel,
    coding: KeyValueCoding | CodingOf | None,
    prompts: Sequence[RecallPrompt],
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    protocol: ReadProtocol | None = None,
    progress: Progress | None = None,
) -> tuple[NeedleGrid, RecallScore]:
    """The grid of `needle_prompts`' prompts, and the same prompts as one score."""
    score = copy_back_recall(model, coding, prompts, protocol=protocol, progress=progress)
    cells = (len(lengths), len(depths), -1)
    accuracy = np.array([prompt.digit_accuracy for prompt in score.prompts]).reshape(cells).mean(-1)
    exact = np.array([prompt.exact for prompt in score.prompts]).reshape(cells).mean(-1)
    grid = NeedleGrid(
        score.coding,
        tuple(lengths),
        tuple(depths),
        tuple(tuple(row) for row in accuracy.tolist()),
        tuple(tuple(row) for row in exact.tolist()),
        score.laid_out_rate,
    )
    return grid, score
