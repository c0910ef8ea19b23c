"""What KL must say: nothing for identity, less with more bits, much for a wrong rotation."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from sphkv_cli.errors import SphkvError
from sphkv_cli.evaluation.coding import CodedTokens, DenseCoding, KeyValueCoding
from sphkv_cli.evaluation.frame_coding import FrameCoding, through
from sphkv_cli.evaluation.intervals import geometric_interval, mean_interval
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.judging import JudgedDocument, judge_document
from sphkv_cli.evaluation.protocol import UniformProtocol
from sphkv_cli.evaluation.published import METHOD_NAMES, published_codings
from sphkv_cli.evaluation.sinks import SinksKeptDense
from sphkv_cli.evaluation.summary import position_bins
from sphkv_cli.evaluation.token_scores import TokenScores, score_tokens
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.sink_rule import SinkRule
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.tier import TierFormat

HEAD_DIM = 32
PROTOCOL = UniformProtocol(window=8, first_tokens=2, first_scored=16)

Judged = Callable[[str], JudgedModel]


def tier(bits: tuple[int, ...]) -> TierFormat:
    return TierFormat.spherical(SphericalCode.analytic("code", HEAD_DIM, bits, "fp16"))


def coding(model: JudgedModel, bits: tuple[int, ...], seed: int = 42) -> FrameCoding:
    frames = FrameSet(Rotation("hadamard", HEAD_DIM, seed))
    return FrameCoding(tier(bits), frames, model.shape, f" {bits}")


def kl(model: JudgedModel, ids: Tensor, codings: list[KeyValueCoding]) -> list[float]:
    found = judge_document(model, JudgedDocument("text", ids), codings, PROTOCOL, logit_chunk=7)
    return [score.kl for score, _ in found]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_identity_has_no_kl(judged: Judged, token_ids: Tensor, family: str) -> None:
    model = judged(family)
    ((score, scores),) = judge_document(
        model, JudgedDocument("text", token_ids), [DenseCoding(model.shape)], PROTOCOL
    )
    # Logits agree to float64 rounding (keys pass through float32); KL is of second order in them.
    assert np.abs(scores.kl).max() < 1e-6
    assert score.top1 == 1.0
    assert score.laid_out_rate == score.code_rate == 16.0
    assert score.perplexity_coded == pytest.approx(score.perplexity_dense, rel=1e-5)


def test_more_bits_never_hurt_on_average(judged: Judged, token_ids: Tensor) -> None:
    model = judged("llama")
    ladder = [(1, 1, 1, 1), (2, 1, 1, 1), (3, 2, 2, 2), (4, 3, 3, 3), (6, 5, 5, 5)]
    means = [
        np.mean(kl(model, token_ids, [coding(model, bits, seed) for seed in (1, 2, 3)]))
        for bits in ladder
    ]
    assert all(more < less for less, more in pairwise(means))
    assert means[-1] < means[0] / 100


@dataclass(frozen=True)
class WrongRotation(KeyValueCoding):
    """Turns keys by one rotation and back by another."""

    right: FrameCoding
    wrong: FrameSet

    name = "wrong"
    token_group = 1

    def code(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> CodedTokens:
        framed = self.right.frames.keys_to_frame(layer, keys)
        back = self.wrong.keys_from_frame(layer, through(self.right.tier.key_format, framed))
        return replace(self.right.code(layer, keys, values, positions), keys=back)

    def code_rate(self, n_tokens: int) -> float:
        return self.right.code_rate(n_tokens)

    def stored_bytes(self, n_tokens: int) -> int:
        return self.right.stored_bytes(n_tokens)

    def table_bytes(self) -> int:
        return self.right.table_bytes()


def test_a_wrong_rotation_is_visibly_worse(judged: Judged, token_ids: Tensor) -> None:
    model = judged("llama")
    right = coding(model, (4, 2, 2, 2))
    wrong = WrongRotation(right, FrameSet(Rotation("hadamard", HEAD_DIM, 43)))
    good, bad = kl(model, token_ids, [right, wrong])
    assert bad > 10 * good


def test_sinks_kept_dense_are_counted_and_help(judged: Judged, token_ids: Tensor) -> None:
    model = judged("llama")
    plain = coding(model, (2, 1, 1, 1))
    everything = SinkRule(np.full((3, 2), 1e9), 0.6)
    nothing = SinkRule(np.full((3, 2), 1e9), 0.0)
    document = JudgedDocument("text", token_ids)
    (bare, _), (same, _), (dense_keys, _) = judge_document(
        model,
        document,
        [plain, SinksKeptDense(plain, nothing), SinksKeptDense(plain, everything)],
        PROTOCOL,
    )
    assert same.kl == bare.kl and same.dense_keys == 0
    # Every stored key of 3 layers and 2 heads: neither the window nor the first tokens.
    assert dense_keys.dense_keys == 6 * (token_ids.numel() - 8 - 2)
    assert dense_keys.kl < bare.kl
    extra = dense_keys.coded_bytes - same.coded_bytes
    assert extra == dense_keys.dense_keys * (2 * HEAD_DIM + 2)


def test_every_published_method_runs_and_states_its_rate(judged: Judged, token_ids: Tensor) -> None:
    model = judged("llama")
    mean = np.zeros((3, 2, HEAD_DIM), dtype=np.float32)
    centred = FrameSet(Rotation("hadamard", HEAD_DIM, 1), "post_rope", mean)
    codings = list(published_codings(METHOD_NAMES, model.shape, centred, [42]))
    found = judge_document(
        model, JudgedDocument("text", token_ids), codings, UniformProtocol(31, 4, 40)
    )
    rates = {
        coding.name: score.code_rate for coding, (score, _) in zip(codings, found, strict=True)
    }
    assert len(rates) == len(METHOD_NAMES)
    assert rates["KIVI-2"] == 3.0 and rates["KIVI-4"] == 5.0
    assert rates["fp8 e4m3, no scale"] == 8.0
    assert rates["TurboQuant-MSE 3 bit, Haar"] == 3 + 16 / HEAD_DIM
    for score, _ in found:
        assert score.laid_out_rate > score.code_rate
    by_name = {c.name: s.kl for c, (s, _) in zip(codings, found, strict=True)}
    assert by_name["KIVI-4"] < by_name["KIVI-2"]
    assert by_name["int8 per token"] < by_name["int4 per token"]


def test_scores_are_the_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 9, 5, generator=generator, dtype=torch.float64)
    ids = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3])
    (found,) = score_tokens(lambda hidden: hidden, p, [q], ids, range(2, 8), chunk=4)
    p, q = torch.softmax(p, -1).numpy(), torch.softmax(q, -1).numpy()
    for index, t in enumerate(range(2, 8)):
        assert found.positions[index] == t
        # float32 logarithms of probabilities around a fifth.
        expected = (p[t] * np.log(p[t] / q[t])).sum()
        assert found.kl[index] == pytest.approx(expected, abs=1e-6)
        following = int(ids[t + 1])
        assert found.nll_dense[index] == pytest.approx(-np.log(p[t, following]), abs=1e-6)
        assert found.nll_coded[index] == pytest.approx(-np.log(q[t, following]), abs=1e-6)
        assert found.agree[index] == (p[t].argmax() == q[t].argmax())


def test_intervals_are_students() -> None:
    interval = mean_interval([1.0, 2.0, 3.0])
    # t of .975 with 2 degrees of freedom is 4.30265 (any table).
    assert interval.mean == 2.0
    assert interval.high - interval.mean == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert np.isnan(mean_interval([1.0]).low)
    assert geometric_interval([1e-3, 1e-1]).mean == pytest.approx(1e-2)


def test_position_bins_cover_every_scored_position_once() -> None:
    positions = np.arange(64, 301)
    kl_values = positions.astype(np.float64)
    zeros = np.zeros_like(kl_values)
    bins = position_bins([TokenScores(positions, kl_values, zeros, zeros, zeros == 0)])
    assert [(b.first, b.last) for b in bins] == [(64, 95), (96, 159), (160, 287), (288, 300)]
    assert [b.kl for b in bins] == [79.5, 127.5, 223.5, 294.0]


def test_a_document_without_scored_positions_is_refused(judged: Judged, token_ids: Tensor) -> None:
    model = judged("llama")
    with pytest.raises(SphkvError, match="--first-scored"):
        judge_document(
            model, JudgedDocument("text", token_ids[:17]), [DenseCoding(model.shape)], PROTOCOL
        )
    with pytest.raises(SphkvError, match="context is 512"):
        judge_document(
            model,
            JudgedDocument("text", token_ids.repeat(8)),
            [DenseCoding(model.shape)],
            PROTOCOL,
        )
