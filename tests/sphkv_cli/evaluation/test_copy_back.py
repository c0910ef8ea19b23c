"""Recall probes: what a prompt holds, what a score counts, and that the coded cache is read."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sphkv_cli.errors import SphkvError, UsageError
from sphkv_cli.evaluation.coding import CodedTokens, DenseCoding
from sphkv_cli.evaluation.copy_back import RecallScore, copy_back_prompts, copy_back_recall
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.needle import needle_grid, needle_prompts
from sphkv_cli.evaluation.protocol import UniformProtocol
from sphkv_cli.evaluation.recall_prompts import PromptShape, RecallPrompt, recall_prompt

FILLER = list(range(97, 123))


def encode(text: str) -> list[int]:
    return list(text.encode())


@dataclass(frozen=True)
class Parrot:
    """A model whose likeliest next token is the true one, but at the positions in `wrong`."""

    wrong: frozenset[int] = frozenset()
    device: str = "cpu"

    def get_decoder(self) -> Callable[..., Any]:
        def body(
            input_ids: torch.Tensor, position_ids: torch.Tensor | None, use_cache: bool
        ) -> Any:
            assert position_ids is None and not use_cache
            following = torch.roll(input_ids[0], -1)
            for position in self.wrong:
                following[position - 1] += 1
            return SimpleNamespace(last_hidden_state=torch.eye(257)[following][None])

        return body

    def judged(self) -> JudgedModel:
        geometry = SimpleNamespace(max_tokens=4096)
        return JudgedModel(self, geometry, (), lambda hidden: hidden)  # type: ignore[arg-type]


@pytest.mark.parametrize("n_keys, n_values", [(1, 1), (4, 1), (3, 2), (26, 1)])
def test_every_code_stands_in_the_context_and_once_more_as_its_answer(
    n_keys: int, n_values: int
) -> None:
    shape = PromptShape(n_context=1400, n_keys=n_keys, n_values=n_values)
    for prompt in copy_back_prompts(encode, FILLER, shape, n_prompts=3):
        ids = prompt.token_ids.tolist()
        context = bytes(ids[: prompt.n_context]).decode()
        asked = bytes(ids[prompt.n_context :]).decode()
        assert len(context) == 1400 and len(prompt.answers) == n_keys * n_values
        codes = [bytes(ids[start:stop]).decode() for start, stop in prompt.answers]
        assert all(len(code) == 7 and code.isdigit() for code in codes)
        assert len(set(codes)) == len(codes)
        for code in codes:
            assert context.count(code) == asked.count(code) == 1
        # Name and code belong together in both places.
        for line in asked.strip().splitlines():
            assert not line or line in context


def test_a_statement_lies_at_the_depth_that_was_asked_for() -> None:
    shape, rng = PromptShape(n_context=800, n_keys=1), np.random.default_rng(0)
    for depth in (0.0, 0.3, 1.0):
        prompt = recall_prompt("", encode, FILLER, shape, rng, [depth])
        text = bytes(prompt.token_ids.tolist()).decode()
        found = text.index("\nThe secret code of ")
        # The statement itself takes about 40 of the tokens.
        assert abs(found - depth * 800) < 45
        assert prompt.depths == (found / 800,)


def test_prompts_repeat_with_their_seed_and_differ_with_another() -> None:
    def ids(seed: int) -> list[list[int]]:
        made = copy_back_prompts(encode, FILLER, PromptShape(), n_prompts=2, seed=seed)
        return [prompt.token_ids.tolist() for prompt in made]

    assert ids(1) == ids(1) and ids(1) != ids(2)
    assert ids(1)[0] != ids(1)[1]


def test_a_start_token_comes_first_and_counts() -> None:
    prompt = copy_back_prompts(encode, FILLER, PromptShape(n_context=400, start=(256,)))[0]
    assert prompt.token_ids[0] == 256 and (prompt.token_ids == 256).sum() == 1
    assert bytes(prompt.token_ids[400:421].tolist()) == b"\nThe secret code of " + bytes(
        prompt.token_ids[420:421].tolist()
    )


def test_statements_longer_than_the_context_are_refused() -> None:
    with pytest.raises(UsageError, match="longer context"):
        copy_back_prompts(encode, FILLER, PromptShape(n_context=100, n_keys=4))
    with pytest.raises(SphkvError, match="no text to put around"):
        copy_back_prompts(encode, [], PromptShape())
    with pytest.raises(UsageError, match="n_digits"):
        PromptShape(n_digits=0)


def test_a_score_counts_digits_and_whole_codes() -> None:
    prompts = copy_back_prompts(encode, FILLER, PromptShape(n_keys=4), n_prompts=1)
    perfect = copy_back_recall(Parrot().judged(), None, prompts)
    assert perfect.digit_accuracy.mean == perfect.exact.mean == 1 and perfect.is_usable_control
    first, last = prompts[0].answers[0], prompts[0].answers[-1]
    wrong = frozenset({first[0], first[1] - 1, last[0]})
    found = copy_back_recall(Parrot(wrong).judged(), None, prompts)
    assert found.digit_accuracy.mean == pytest.approx(25 / 28)
    assert found.exact.mean == 0.5 and not found.is_usable_control
    assert found.prompts[0].digits[0] == (False, True, True, True, True, True, False)


def test_a_needle_grid_has_each_prompt_in_its_cell() -> None:
    lengths, depths = (300, 500), (0.0, 0.5, 1.0)
    shape = PromptShape()
    prompts = needle_prompts(encode, FILLER, shape, lengths=lengths, depths=depths, n_prompts=2)
    assert [prompt.n_context for prompt in prompts] == [300] * 6 + [500] * 6
    long = prompts[6:]
    start, _ = long[2].answers[0]
    hit = [any(first <= start < stop for first, stop in p.answers) for p in long]
    model = Parrot(frozenset({start})).judged()
    grid, score = needle_grid(model, None, long, lengths=(500,), depths=depths)
    assert isinstance(score, RecallScore) and hit[2]
    cells = np.reshape(hit, (3, 2)).mean(axis=1)
    assert np.allclose(grid.digit_accuracy, [1 - cells / 7])
    assert np.allclose(grid.exact, [1 - cells])
    more = needle_prompts(encode, FILLER, shape, lengths=(500,), depths=(0.5,), n_prompts=2)
    assert [p.token_ids.tolist() for p in more] == [p.token_ids.tolist() for p in prompts[8:10]]


def test_the_dense_coding_recalls_what_the_dense_model_does(
    judged: Callable[[str], JudgedModel],
) -> None:
    model = judged("llama")
    prompts = _tiny_prompts()
    dense = copy_back_recall(model, None, prompts)
    for protocol in (None, UniformProtocol(8, 2, 0)):
        coded = copy_back_recall(model, DenseCoding(model.shape), prompts, protocol=protocol)
        assert [p.digits for p in coded.prompts] == [p.digits for p in dense.prompts]
        assert coded.laid_out_rate == 16.0


def test_the_coding_is_made_for_each_prompt_and_read(judged: Callable[[str], JudgedModel]) -> None:
    model = judged("llama")
    prompts, asked = _tiny_prompts(), []

    class Forgetful(DenseCoding):
        def code(self, layer: int, keys: Any, values: Any, positions: Any) -> CodedTokens:
            assert len(positions) == 96
            return CodedTokens(torch.full_like(keys, torch.nan), values)

    def of(prompt: RecallPrompt) -> Forgetful:
        asked.append(prompt.name)
        return Forgetful(model.shape)

    found = copy_back_recall(model, of, prompts)
    assert asked == ["prompt 0", "prompt 1"]
    # Logits of NaN: argmax falls on token 0, which no digit is.
    assert found.digit_accuracy.mean == 0


def _tiny_prompts() -> tuple[RecallPrompt, ...]:
    shape = PromptShape(n_context=96, n_keys=2, n_digits=3)
    return copy_back_prompts(encode, FILLER, shape, n_prompts=2)
