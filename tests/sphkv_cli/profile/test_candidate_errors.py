"""Errors of a candidate against a plain float64 computation, query by query."""

import math
from dataclasses import dataclass

import pytest
import torch

from sphkv_cli.profile.candidate_errors import CandidateErrors, ExactHead
from sphkv_cli.profile.layer_inputs import LayerInputs

N_CONTEXT, N_TOKENS, HEAD_DIM = 37, 45, 16


def make_inputs(seed: int, *, window: int = 0, softcap: float = 0.0) -> LayerInputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    positions = torch.arange(N_CONTEXT, N_TOKENS)
    distance = positions[:, None] - torch.arange(N_TOKENS)
    seen = distance >= 0
    if window:
        seen &= distance < window
    keys, values = normal(N_TOKENS, 2, HEAD_DIM), normal(N_TOKENS, 2, HEAD_DIM)
    return LayerInputs(
        layer=0,
        n_context=N_CONTEXT,
        softmax_scale=HEAD_DIM**-0.5,
        logit_softcap=softcap,
        window=window,
        queries=2 * normal(positions.numel(), 4, HEAD_DIM),
        positions=positions,
        logit_offset=normal(positions.numel(), 4),
        keys=keys,
        values=values,
        code_keys=keys[:N_CONTEXT].float(),
        code_values=values[:N_CONTEXT].float(),
        seen=seen,
    )


@dataclass
class Plain:
    """The same quantities, one query and one head at a time, from their definitions."""

    differences: list[float]
    kls: list[float]
    error_sq: float
    output_sq: float
    relative: list[float]


def plain_errors(
    inputs: LayerInputs, head: int, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor
) -> Plain:
    found = Plain([], [], 0.0, 0.0, [])
    kv_head = head // 2
    for i in range(inputs.queries.shape[0]):
        q, offset = inputs.queries[i, head], inputs.logit_offset[i, head]
        position = int(inputs.positions[i])
        first = max(0, position - inputs.window + 1) if inputs.window else 0
        dense = list(range(first, position + 1))
        coded = [t for t in dense if t >= N_CONTEXT or bool(kept[t])]

        def score(k: torch.Tensor, q: torch.Tensor = q, offset: torch.Tensor = offset) -> float:
            s = float((q @ k + offset) * inputs.softmax_scale)
            cap = inputs.logit_softcap
            return cap * math.tanh(s / cap) if cap else s

        k_hat = {t: keys[t] if t < N_CONTEXT else inputs.keys[t, kv_head] for t in coded}
        v_hat = {t: values[t] if t < N_CONTEXT else inputs.values[t, kv_head] for t in coded}
        p = softmax({t: score(inputs.keys[t, kv_head]) for t in dense})
        p_hat = softmax({t: score(k_hat[t]) for t in coded})
        found.differences += [
            float(q @ (keys[t] - inputs.keys[t, kv_head])) * inputs.softmax_scale
            for t in coded
            if t < N_CONTEXT
        ]
        found.kls.append(sum(p_hat[t] * math.log(p_hat[t] / p[t]) for t in coded))
        o = sum(p[t] * inputs.values[t, kv_head] for t in dense)
        o_hat = sum(p_hat[t] * v_hat[t] for t in coded)
        assert isinstance(o, torch.Tensor)
        assert isinstance(o_hat, torch.Tensor)
        found.error_sq += float((o_hat - o) @ (o_hat - o))
        found.output_sq += float(o @ o)
        found.relative.append(float((o_hat - o).norm() / o.norm()))
    return found


def softmax(scores: dict[int, float]) -> dict[int, float]:
    top = max(scores.values())
    total = sum(math.exp(s - top) for s in scores.values())
    return {t: math.exp(s - top) / total for t, s in scores.items()}


@pytest.mark.parametrize("dropped", ["none", "some", "all"])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (12, 0.0), (0, 3.0), (30, 3.0)])
def test_every_statistic_follows_from_its_definition(
    window: int, softcap: float, dropped: str
) -> None:
    inputs = make_inputs(5, window=window, softcap=softcap)
    generator = torch.Generator().manual_seed(6)
    noise = torch.randn((2, N_CONTEXT, 2, HEAD_DIM), generator=generator, dtype=torch.float64)
    keys = inputs.keys[:N_CONTEXT] + 0.2 * noise[0]
    values = inputs.values[:N_CONTEXT] + 0.2 * noise[1]
    share = {"none": 1.1, "some": 0.6, "all": -0.1}[dropped]
    kept = torch.rand((N_CONTEXT, 2), generator=generator) < share
    made_sq = (0.2 * noise[0]).square().sum(-1)
    norms = made_sq.sqrt()
    errors = CandidateErrors(4)
    for kv_head in range(2):
        exact = ExactHead.of(inputs, kv_head)
        per_key = (2 * made_sq[:, kv_head], made_sq[:, kv_head], norms[:, kv_head])
        errors.add(
            inputs, kv_head, exact, keys[:, kv_head], values[:, kv_head], kept[:, kv_head], per_key
        )
    for head in range(4):
        plain = plain_errors(
            inputs, head, keys[:, head // 2], values[:, head // 2], kept[:, head // 2]
        )
        n = len(plain.differences)
        assert int(errors.logit.count[head]) == n
        assert float(errors.n_queries[head]) == len(plain.kls)
        close(errors.kl_sum[head], sum(plain.kls))
        close(errors.kl_max[head], max(plain.kls))
        close(errors.error_sq[head], plain.error_sq)
        close(errors.output_sq[head], plain.output_sq)
        close(errors.relative_max[head], max(plain.relative))
        if n == 0:
            assert math.isnan(float(errors.logit.rms()[head]))
            continue
        squares = [d * d for d in plain.differences]
        close(errors.logit.rms()[head], math.sqrt(sum(squares) / n))
        close(errors.logit.maximum()[head], max(map(abs, plain.differences)))
        # ||q|| ||e|| softmax_scale bounds every difference, by Cauchy-Schwarz.
        assert float(errors.bound[head]) >= max(map(abs, plain.differences))
        close(errors.predicted_sq[head], 2 * float(errors.expected_sq[head]))
        expected = 0.0
        for i, position in enumerate(inputs.positions.tolist()):
            q_sq = float(inputs.queries[i, head].square().sum())
            for t in range(N_CONTEXT):
                if bool(kept[t, head // 2]) and (not window or position - t < window):
                    expected += q_sq * float(made_sq[t, head // 2]) / HEAD_DIM / HEAD_DIM
        close(errors.expected_sq[head], expected)


def close(actual: torch.Tensor, expected: float) -> None:
    """1e-10: float64 sums in another order, with cancellation in the KL."""
    assert float(actual) == pytest.approx(expected, rel=1e-10, abs=1e-13)


def test_isotropic_errors_have_the_expected_rms() -> None:
    """Over many tokens and queries, to the 5 % that 2,000 pairs of a head allow."""
    inputs = make_inputs(8)
    errors = CandidateErrors(4)
    generator = torch.Generator().manual_seed(10)
    for _ in range(60):
        noise = torch.randn((N_CONTEXT, HEAD_DIM), generator=generator, dtype=torch.float64)
        made = noise.square().sum(-1)
        keys = inputs.keys[:N_CONTEXT, 0] + noise
        exact = ExactHead.of(inputs, 0)
        kept = torch.ones(N_CONTEXT, dtype=torch.bool)
        values = inputs.values[:N_CONTEXT, 0]
        errors.add(inputs, 0, exact, keys, values, kept, (made, made, made.sqrt()))
    ratio = (errors.expected_sq[:2] / errors.logit.sum_sq[:2]).sqrt()
    assert bool((ratio - 1).abs().max() < 0.05)


def test_nothing_changes_where_codes_are_exact() -> None:
    inputs = make_inputs(9)
    errors = CandidateErrors(4)
    zero = torch.zeros(N_CONTEXT, dtype=torch.float64)
    for kv_head in range(2):
        errors.add(
            inputs,
            kv_head,
            ExactHead.of(inputs, kv_head),
            inputs.keys[:N_CONTEXT, kv_head],
            inputs.values[:N_CONTEXT, kv_head],
            torch.ones(N_CONTEXT, dtype=torch.bool),
            (zero, zero, zero),
        )
    # A product of another shape may round its sums in another order.
    assert float(errors.logit.maximum().max()) < 1e-14
    assert float(errors.kl_max.max()) < 1e-14
    assert float(errors.relative_max.max()) < 1e-14
