"""Prompts that a model can answer only from its cache: codes stated in a text, asked for after it.

    [filler "The secret code of harbor is: 4829153" filler ... filler]["The secret code of harbor
     is: " 4829153 ...]          the first bracket is the context, the second the continuation

A code is drawn digit by digit, so nothing but the cache predicts it: guessing gets a tenth of the
digits.  The continuation is teacher-forced; every digit right under teacher forcing is the same as
greedy decoding that writes the code.  Source: after the key-value retrieval of RULER
(arXiv 2404.06654), wording ours, chosen for what a model of 135 M parameters answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sphkv_cli.errors import SphkvError, UsageError

Encode = Callable[[str], list[int]]
"""Text to token ids, without special tokens."""

NAMES = (
    "harbor",
    "violet",
    "lantern",
    "meadow",
    "copper",
    "falcon",
    "willow",
    "ember",
    "canyon",
    "marble",
    "saffron",
    "glacier",
    "orchid",
    "thunder",
    "pebble",
    "walnut",
    "dolphin",
    "velvet",
    "cactus",
    "anchor",
    "maple",
    "comet",
    "raven",
    "ginger",
    "island",
    "tulip",
)


@dataclass(frozen=True)
class RecallPrompt:
    """token_ids: (n_tokens) int64, the first n_context of them the context.

    answers: positions [start, stop) of each code in the continuation.  depths: where each code's
    statement begins, as a fraction of the context, in the order of `answers`.
    """

    name: str
    token_ids: Tensor
    n_context: int
    answers: tuple[tuple[int, int], ...]
    depths: tuple[float, ...]

    @property
    def n_tokens(self) -> int:
        """Length."""
        return int(self.token_ids.numel())


@dataclass(frozen=True)
class PromptShape:
    """n_context tokens with n_keys statements of n_values codes each, n_digits a code.

    start: token ids that every prompt begins with (a beginning-of-sequence token, or none).
    """

    n_context: int = 512
    n_keys: int = 4
    n_values: int = 1
    n_digits: int = 7
    start: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("n_context", "n_keys", "n_values", "n_digits"):
            if getattr(self, name) < 1:
                raise UsageError(f"a probe with {name} {getattr(self, name)}", "give 1 or more")
        if self.n_keys > len(NAMES):
            raise UsageError(f"{self.n_keys} keys", f"at most {len(NAMES)} have names")

    @property
    def question(self) -> str:
        """What stands before the codes of a key, in the context and after it."""
        codes = "code" if self.n_values == 1 else "codes"
        verb = "is" if self.n_values == 1 else "are"
        return f"\nThe secret {codes} of {{name}} {verb}: "


def recall_prompt(
    name: str,
    encode: Encode,
    filler: Sequence[int],
    shape: PromptShape,
    rng: np.random.Generator,
    depths: Sequence[float] | None = None,
) -> RecallPrompt:
    """One prompt; its filler is a stretch of `filler` from a drawn token on, repeated if short.

    Args:
        filler: token ids of text of the judged domain.
        depths: of each statement in [0, 1]; None draws them.

    Raises:
        UsageError: the context is too short for its statements.
        SphkvError: there is no filler.
    """
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[: shape.n_keys]]
    codes = [
        ["".join(map(str, rng.integers(0, 10, shape.n_digits))) for _ in range(shape.n_values)]
        for _ in names
    ]
    if depths is None:
        depths = sorted(rng.random(shape.n_keys).tolist())
    statements = [
        _statement(encode, shape.question.format(name=name), values)
        for name, values in zip(names, codes, strict=True)
    ]
    end = encode("\n")
    n_stated = len(shape.start) + sum(len(ids) + len(end) for ids, _ in statements)
    n_filler = shape.n_context - n_stated
    if n_filler < 1:
        raise UsageError(
            f"a context of {shape.n_context} tokens is too short for what it states, "
            f"{n_stated} tokens",
            "give a longer context (--probe-length), or fewer keys and values",
        )
    if not len(filler):
        raise SphkvError(
            "there is no text to put around the statements", "capture documents of this split"
        )
    first = int(rng.integers(len(filler)))
    text = [int(filler[(first + i) % len(filler)]) for i in range(n_filler)]
    ids, starts = list(shape.start), []
    taken = 0
    for depth, (statement, _) in zip(depths, statements, strict=True):
        upto = max(taken, round(depth * n_filler))
        ids += text[taken:upto]
        taken = upto
        starts.append(len(ids) / shape.n_context)
        ids += statement + end
    ids += text[taken:]
    assert len(ids) == shape.n_context
    answers, asked_depths = [], []
    for key in rng.permutation(shape.n_keys):
        statement, spans = statements[key]
        answers += [(len(ids) + start, len(ids) + stop) for start, stop in spans]
        asked_depths += [starts[key]] * len(spans)
        ids += statement + end
    return RecallPrompt(
        name, torch.tensor(ids), shape.n_context, tuple(answers), tuple(asked_depths)
    )


def encoder_of(tokenizer: Any) -> Encode:
    """A transformers tokenizer as `Encode`."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    return encode


def start_tokens(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before every text (a beginning-of-sequence token, or nothing)."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    first = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    return tuple(full[:first])


def _statement(
    encode: Encode, question: str, codes: Sequence[str]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a question with its codes, and where each code lies in them."""
    ids, spans = encode(question), []
    for index, code in enumerate(codes):
        ids = ids + (encode(", ") if index else [])
        tokens = encode(code)
        spans.append((len(ids), len(ids) + len(tokens)))
        ids = ids + tokens
    return ids, spans
