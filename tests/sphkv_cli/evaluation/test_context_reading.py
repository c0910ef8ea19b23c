"""A context prefilled once reads as one that runs again with every coding."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from sphkv_cli.errors import SphkvError
from sphkv_cli.evaluation.coding import CodedTokens, KeyValueCoding
from sphkv_cli.evaluation.comparator_coding import ComparatorCoding
from sphkv_cli.evaluation.context_reading import ContextReader
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.judging import JudgedDocument, judge_document
from sphkv_cli.evaluation.plan_coding import PlanCoding
from sphkv_cli.evaluation.protocol import RetentionProtocol, UniformProtocol
from sphkv_cli.evaluation.retained_context import RetainedContext
from sphkv_codebooks.comparators.kivi import KiviKeys, KiviValues
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.tier import TierFormat

HEAD_DIM, N_CONTEXT = 32, 50
# Codes are decided in float32 from equal inputs; all else is float64.
ROUNDING = 1e-9


def codings(model: JudgedModel, *, n_plans: int) -> list[KeyValueCoding]:
    """KIVI with an unfinished group, and plans of three tiers with dropped tokens."""
    low = SphericalCode.analytic("low", HEAD_DIM, (3, 2, 2, 2), "fp16")
    tiers = (TierFormat.spherical(low), TierFormat.int8(), TierFormat.dense())
    frames = FrameSet(Rotation("hadamard", HEAD_DIM, 1))
    draw = np.random.default_rng(4)
    plans = [
        PlanCoding(
            f"plan {index}",
            tiers,
            frames,
            model.shape,
            draw.integers(-1, 3, (3, 2, N_CONTEXT)).astype(np.int8),
            1000,
        )
        for index in range(n_plans)
    ]
    return [ComparatorCoding("KIVI-2", KiviKeys(2), KiviValues(2), model.shape), *plans]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("n_plans", [1, 2])
def test_tokens_after_a_context_read_it_as_a_whole_run_does(
    judged: Callable[[str], JudgedModel], token_ids: Tensor, family: str, n_plans: int
) -> None:
    model = judged(family)
    asked = codings(model, n_plans=n_plans)
    context = RetainedContext.of(model, "text", token_ids, N_CONTEXT)
    reader = ContextReader.of(context, asked)
    assert (reader.shared is not None) == (n_plans == 2)
    for coding in asked:
        found, n_dense = reader.read(coding)
        whole, _ = model.coded_hidden(token_ids, coding, RetentionProtocol(N_CONTEXT))
        assert n_dense == 0
        assert (found - whole[N_CONTEXT:]).abs().max() < ROUNDING
        # What is read is the code.
        assert (found - model.dense_hidden(token_ids)[N_CONTEXT:]).abs().max() > 1e-2


@dataclass(frozen=True, eq=False)
class Failing(ComparatorCoding):
    """Fails in layer 1."""

    fail: Callable[[], object] = print

    def code(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> CodedTokens:
        if layer == 1:
            self.fail()
        return super().code(layer, keys, values, positions)


def failing(model: JudgedModel, fail: Callable[[], object]) -> KeyValueCoding:
    return Failing("KIVI-2", KiviKeys(2), KiviValues(2), model.shape, None, fail)


def no_gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def no_cpu_memory() -> None:
    """What no machine has."""
    torch.empty(1 << 50)


@pytest.mark.parametrize("fail", [no_gpu_memory, no_cpu_memory])
def test_memory_that_runs_out_while_coding_is_said_and_leaves_the_model_as_it_was(
    judged: Callable[[str], JudgedModel], token_ids: Tensor, fail: Callable[[], object]
) -> None:
    model = judged("llama")
    before = model.dense_hidden(token_ids)
    document = JudgedDocument("text", token_ids)
    for protocol in (RetentionProtocol(N_CONTEXT), UniformProtocol(31, 4, 40)):
        with pytest.raises(SphkvError, match="ran out of memory"):
            judge_document(model, document, [failing(model, fail)], protocol)
        assert torch.equal(model.dense_hidden(token_ids), before)


def test_other_errors_of_torch_keep_their_traceback(
    judged: Callable[[str], JudgedModel], token_ids: Tensor
) -> None:
    model = judged("llama")

    def fail() -> None:
        torch.ones(2) @ torch.ones(3)

    with pytest.raises(RuntimeError, match="size"):
        judge_document(
            model, JudgedDocument("text", token_ids), [failing(model, fail)], RetentionProtocol(50)
        )


def test_scores_name_positions_of_the_document(
    judged: Callable[[str], JudgedModel], token_ids: Tensor
) -> None:
    model = judged("llama")
    protocol = RetentionProtocol(N_CONTEXT)
    asked = codings(model, n_plans=1)
    found = judge_document(model, JudgedDocument("text", token_ids), asked, protocol, logit_chunk=7)
    n_tokens = token_ids.numel()
    logits = torch.log_softmax(model.head(model.dense_hidden(token_ids)).double(), dim=-1)
    for coding, (score, scores) in zip(asked, found, strict=True):
        assert scores.positions.tolist() == list(range(N_CONTEXT, n_tokens - 1))
        assert score.n_scored == n_tokens - 1 - N_CONTEXT
        following = token_ids[N_CONTEXT + 1 :]
        expected = -logits[N_CONTEXT : n_tokens - 1].gather(1, following[:, None])[:, 0]
        assert np.allclose(scores.nll_dense, expected.numpy(), atol=1e-5)
        hidden, _ = model.coded_hidden(token_ids, coding, protocol)
        coded = torch.log_softmax(model.head(hidden).double(), dim=-1)[N_CONTEXT : n_tokens - 1]
        p = logits[N_CONTEXT : n_tokens - 1]
        expected_kl = (p.exp() * (p - coded)).sum(dim=-1)
        assert np.allclose(scores.kl, expected_kl.numpy(), atol=1e-5)
