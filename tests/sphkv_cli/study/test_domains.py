"""Domains share nothing between fit and judge, and say what is missing."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from sphkv_cli.errors import SphkvError
from sphkv_cli.study.domains import Domain, Tokenizer, all_domains, cut


def words(text: str) -> Sequence[int]:
    """A token per character."""
    return [ord(character) for character in text]


def joined(ids: Sequence[int]) -> str:
    return "".join(chr(32 + index % 90) for index in ids)


CHARACTERS = Tokenizer(words, lambda ids: "".join(map(chr, ids)), 128)
RANDOM = Tokenizer(words, joined, 90)


@pytest.fixture
def no_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_texts_that_were_not_fetched_are_named(no_texts: None) -> None:
    domains, notes = all_domains(RANDOM, 100, seed=1)
    assert [d.name for d in domains] == ["code", "one word", "one sentence", "random tokens"]
    assert len(notes) == 3
    assert notes[0].startswith("Without prose: the texts austen are not fetched")
    assert "sphkv_cli.texts.fetch austen" in notes[0]


def test_fetched_texts_become_domains(tmp_path: Path, no_texts: None) -> None:
    from sphkv_cli.texts.packages import texts_folder

    folder = texts_folder("austen")
    folder.mkdir(parents=True)
    for name in ("emma", "sense_and_sensibility", "persuasion"):
        (folder / f"{name}.txt").write_text(f"{name} " * 50)
    prose = all_domains(RANDOM, 100, seed=1)[0][0]
    assert prose.name == "prose"
    assert (prose.fit[:4], prose.select[:5], prose.judge[:10]) == ("emma", "sense", "persuasion")


def test_nothing_is_learned_from_what_is_judged(no_texts: None) -> None:
    for domain in all_domains(RANDOM, 200, seed=1)[0]:
        heads = {text[:200] for text in (domain.fit, domain.select, domain.judge)}
        assert len(heads) == 3
        assert domain.judge[:200] not in domain.fit


def test_random_texts_repeat_with_their_seed(no_texts: None) -> None:
    first, again, other = (all_domains(RANDOM, 50, seed)[0][-1].fit for seed in (1, 1, 2))
    assert first == again != other


def test_a_text_is_cut_to_its_tokens_and_a_few_more(tmp_path: Path) -> None:
    text = "abcdefghij" * 30
    assert text.startswith(cut(text, CHARACTERS, 100, "x"))
    assert 100 < len(cut(text, CHARACTERS, 100, "x")) < 120
    with pytest.raises(SphkvError, match=r"the text x has 300 tokens, 30\d are needed"):
        cut(text, CHARACTERS, 300, "x")
    sources = Domain("one word", text, text[1:], text[2:]).written(tmp_path, CHARACTERS, 150, 90)
    assert [source.split for source in sources] == ["fit", "select", "judge"]
    assert 150 < len(sources[0].path.read_text()) < 170
