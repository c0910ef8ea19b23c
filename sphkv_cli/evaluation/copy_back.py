"""Copy-back: how many digits of codes stated in a context come back when it is read coded.

    digit accuracy = fraction of a prompt's digits that are the likeliest next token
    exact          = fraction of its codes with every digit so

Perplexity does not see a cache that lost what a later question needs: digits do.  The dense model
is asked in the same run; where it fails itself the probe proves nothing, and says so.
Source: ours, after RULER's multi-key and multi-value retrieval (arXiv 2404.06654).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sphkv_cli.evaluation.coding import KeyValueCoding
from sphkv_cli.evaluation.intervals import Interval, mean_interval
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.protocol import ReadProtocol, RetentionProtocol
from sphkv_cli.evaluation.recall_prompts import Encode, PromptShape, RecallPrompt, recall_prompt
from sphkv_cli.evaluation.sinks import dense_key_bytes
from sphkv_cli.progress import NullProgress, Progress

LEAST_DENSE_ACCURACY = 0.9

CodingOf = Callable[[RecallPrompt], KeyValueCoding]
"""The coding of one prompt's context: a plan is made for the tokens it keeps."""


@dataclass(frozen=True)
class PromptRecall:
    """One prompt under one coding.

    digits: per code, per digit (token of the code), whether it was the likeliest; depths: of each
    code's statement in the context.  laid_out_rate: bits per coordinate of the coded tokens as
    laid out, fixed tables included.
    """

    name: str
    digits: tuple[tuple[bool, ...], ...]
    depths: tuple[float, ...]
    laid_out_rate: float

    @property
    def digit_accuracy(self) -> float:
        """Fraction of digits."""
        return float(np.mean([right for code in self.digits for right in code]))

    @property
    def exact(self) -> float:
        """Fraction of codes."""
        return float(np.mean([all(code) for code in self.digits]))


@dataclass(frozen=True)
class RecallScore:
    """One coding over all prompts; intervals: 95 % over prompts."""

    coding: str
    digit_accuracy: Interval
    exact: Interval
    laid_out_rate: float
    prompts: tuple[PromptRecall, ...]

    @staticmethod
    def of(coding: str, prompts: Sequence[PromptRecall]) -> "RecallScore":
        """Summarise prompts."""
        return RecallScore(
            coding,
            _fraction([prompt.digit_accuracy for prompt in prompts]),
            _fraction([prompt.exact for prompt in prompts]),
            float(np.mean([prompt.laid_out_rate for prompt in prompts])),
            tuple(prompts),
        )

    @property
    def is_usable_control(self) -> bool:
        """Whether a dense model with this score makes the probe worth reading."""
        return self.digit_accuracy.mean >= LEAST_DENSE_ACCURACY


def copy_back_prompts(
    encode: Encode,
    filler: Sequence[int],
    shape: PromptShape,
    *,
    n_prompts: int = 8,
    seed: int = 42,
) -> tuple[RecallPrompt, ...]:
    """Prompts with their statements at drawn depths.

    Raises:
        SphkvError: as `recall_prompt`.
    """
    rng = np.random.default_rng(seed)
    return tuple(recall_prompt(f"prompt {i}", encode, filler, shape, rng) for i in range(n_prompts))


def copy_back_recall(
    model: JudgedModel,
    coding: KeyValueCoding | CodingOf | None,
    prompts: Sequence[RecallPrompt],
    *,
    protocol: ReadProtocol | None = None,
    progress: Progress | None = None,
) -> RecallScore:
    """Recall of a coding over prompts, through the masked parallel forward.

    Args:
        coding: one for all prompts, one per prompt, or None: the dense model as it was loaded.
        protocol: None is retention: each prompt's context is coded once, what follows is dense.

    Raises:
        SphkvError: a prompt longer than the model's context.
    """
    progress = progress or NullProgress()
    found, name = [], "dense"
    for prompt in prompts:
        model.require_length(
            f"the probe's {prompt.name!r}", prompt.n_tokens, "ask for shorter contexts"
        )
        ids = prompt.token_ids.to(model.model.device)
        if coding is None:
            hidden, rate = model.dense_hidden(ids), 16.0
        else:
            of_prompt = coding if isinstance(coding, KeyValueCoding) else coding(prompt)
            reads = protocol or RetentionProtocol(prompt.n_context)
            hidden, run = model.coded_hidden(ids, of_prompt, reads)
            n_coded = len(reads.coded_positions(prompt.n_tokens))
            n_bytes = of_prompt.stored_bytes(n_coded) + of_prompt.table_bytes()
            n_bytes += dense_key_bytes(run.n_dense_keys, model.shape.head_dim, prompt.n_tokens)
            name, rate = of_prompt.name, 8.0 * n_bytes / model.shape.n_coordinates(max(n_coded, 1))
        found.append(prompt_recall(model, prompt, hidden, rate))
        progress.advance()
    return RecallScore.of(name, found)


def prompt_recall(
    model: JudgedModel,
    prompt: RecallPrompt,
    hidden: torch.Tensor,
    rate: float,
    *,
    first_position: int = 0,
) -> PromptRecall:
    """What a run recalled; hidden: final states of the tokens from first_position on."""
    digits = []
    for start, stop in prompt.answers:
        rows = slice(start - 1 - first_position, stop - 1 - first_position)
        likeliest = model.head(hidden[rows]).argmax(dim=-1).cpu()
        digits.append(tuple((likeliest == prompt.token_ids[start:stop]).tolist()))
    return PromptRecall(prompt.name, tuple(digits), prompt.depths, rate)


def _fraction(samples: Sequence[float]) -> Interval:
    found = mean_interval(samples)
    return Interval(found.mean, max(found.low, 0.0), min(found.high, 1.0))
