"""Texts of several kinds to calibrate on and to judge: real ones, code, and adversarial ones.

Each domain has three texts that share nothing but their kind: `fit` to learn from, `judge` to be
measured on, and a short `select` that a capture must have.  Prose, news and argument come from
fetched packages (`sphkv_cli.texts`), code from Python's own standard library; the adversarial ones
are made: one word repeated, one sentence repeated, tokens drawn uniformly.
"""

import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sphkv_cli.capture.options import TextSource
from sphkv_cli.errors import EnvironmentUnable, SphkvError
from sphkv_cli.texts.packages import fetched_texts

SELECT_TOKENS = 80
_SLACK = 8
"""Text cut after n tokens may make a few fewer when it is read again."""

_PARTS: Mapping[str, tuple[str, tuple[str, str, str]]] = {
    "prose": ("austen", ("emma", "sense_and_sensibility", "persuasion")),
    "news": ("brown", ("news", "editorial", "reviews")),
    "argument": ("anarchist-faq", ("secA", "secD", "secJ")),
}
"""Package, and its texts for fit, select and judge."""

_CODE = (("inspect", "typing", "argparse"), ("textwrap",), ("tarfile", "subprocess", "doctest"))
_WORDS = ("the", "and", "of")
_SENTENCES = (
    "The quick brown fox jumps over the lazy dog. ",
    "She sells sea shells by the sea shore. ",
    "All work and no play makes Jack a dull boy. ",
)


@dataclass(frozen=True)
class Tokenizer:
    """What making texts of a given length needs of a tokenizer; n_tokens: of its vocabulary."""

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    n_tokens: int


@dataclass(frozen=True)
class Domain:
    """A kind of text: fit, select and judge."""

    name: str
    fit: str
    select: str
    judge: str

    def written(
        self, folder: Path, tokenizer: Tokenizer, n_fit: int, n_judge: int
    ) -> tuple[TextSource, ...]:
        """Its texts as files, cut to these numbers of tokens; what a capture reads.

        Raises:
            SphkvError: a text is shorter.
        """
        sources = []
        for split, text, n_tokens in (
            ("fit", self.fit, n_fit),
            ("select", self.select, SELECT_TOKENS),
            ("judge", self.judge, n_judge),
        ):
            path = folder / f"{self.name.replace(' ', '-')}-{split}.txt"
            path.write_text(cut(text, tokenizer, n_tokens, f"{self.name}, {split}"), "utf-8")
            sources.append(TextSource.parse(f"{split}={path}"))
        return tuple(sources)


def cut(text: str, tokenizer: Tokenizer, n_tokens: int, name: str) -> str:
    """The beginning of a text that makes n_tokens tokens (and a few more)."""
    # 12 characters a token are more than any text here has; the rest need not be read.
    ids = tokenizer.encode(text[: 12 * (n_tokens + _SLACK)])
    if len(ids) < n_tokens + _SLACK:
        raise SphkvError(
            f"the text {name} has {len(ids)} tokens, {n_tokens + _SLACK} are needed",
            "lower --max-documents",
        )
    return tokenizer.decode(ids[: n_tokens + _SLACK])


def all_domains(
    tokenizer: Tokenizer, n_tokens: int, seed: int
) -> tuple[tuple[Domain, ...], tuple[str, ...]]:
    """Every domain whose texts are here, with room for n_tokens, and notes on those left out."""
    found, notes = [], []
    for name, (package, parts) in _PARTS.items():
        try:
            paths = {path.stem: path for path in fetched_texts(package)}
        except EnvironmentUnable as error:
            notes.append(f"Without {name}: {error}.")
            continue
        found.append(Domain(name, *(paths[part].read_text("utf-8") for part in parts)))
    found.append(Domain("code", *("\n\n".join(map(_source, names)) for names in _CODE)))
    repeats = 2 * (n_tokens + SELECT_TOKENS)
    found.append(Domain("one word", *(f"{word} " * repeats for word in _WORDS)))
    found.append(Domain("one sentence", *(sentence * repeats for sentence in _SENTENCES)))
    found.append(Domain("random tokens", *_random_texts(tokenizer, repeats, seed)))
    return tuple(found), tuple(notes)


def _source(module: str) -> str:
    path = Path(sysconfig.get_path("stdlib")) / f"{module}.py"
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise SphkvError(
            f"Python's own source {path} cannot be read ({error.strerror})",
            "use a Python that comes with its sources",
        ) from error


def _random_texts(tokenizer: Tokenizer, n_tokens: int, seed: int) -> tuple[str, str, str]:
    rng = np.random.default_rng((seed, 2))
    drawn = rng.integers(0, tokenizer.n_tokens, (3, n_tokens))
    fit, select, judge = (tokenizer.decode(row.tolist()) for row in drawn)
    return fit, select, judge
