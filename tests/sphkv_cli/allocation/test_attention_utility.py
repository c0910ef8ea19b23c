"""Utilities are what attention really loses: exact for one drop, first order for small errors."""

import pytest
import torch

from sphkv_cli.allocation.attention_utility import LayerGeometry, token_utility, visible

N_TOKENS, N_CONTEXT, N_QUERIES, HEAD_DIM = 23, 17, 5, 8
N_KV_HEADS, N_Q_HEADS = 2, 6


class Case:
    """Random attention of one layer; the queries sit at the last positions."""

    def __init__(self, geometry: LayerGeometry, *, sharpness: float = 1.0) -> None:
        self.geometry = geometry
        rng = torch.Generator().manual_seed(3)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=rng, dtype=torch.float64)

        self.queries = sharpness * draw(N_QUERIES, N_Q_HEADS, HEAD_DIM)
        self.keys = draw(N_TOKENS, N_KV_HEADS, HEAD_DIM)
        self.values = draw(N_TOKENS, N_KV_HEADS, HEAD_DIM)
        self.weights = torch.rand(N_Q_HEADS, generator=rng, dtype=torch.float64) + 0.5
        self.positions = torch.arange(N_TOKENS - N_QUERIES, N_TOKENS)

    def utility(self, mean_over="all"):
        return token_utility(
            self.queries,
            (self.queries**2).sum(-1),
            self.positions,
            self.keys,
            self.values,
            self.weights,
            self.geometry,
            n_context=N_CONTEXT,
            mean_over=mean_over,
        )

    def outputs(self, head: int, keys=None, values=None, without: int | None = None):
        """(n_queries, head_dim) of one query head, by the definition."""
        kv_head = head // (N_Q_HEADS // N_KV_HEADS)
        keys = self.keys[:, kv_head] if keys is None else keys
        values = self.values[:, kv_head] if values is None else values
        logits = self.queries[:, head] @ keys.T * self.geometry.softmax_scale
        cap = self.geometry.logit_softcap
        if cap:
            logits = cap * torch.tanh(logits / cap)
        for i, position in enumerate(self.positions.tolist()):
            for t in range(N_TOKENS):
                far = self.geometry.window and position - t >= self.geometry.window
                if t > position or far or t == without:
                    logits[i, t] = -torch.inf
        return torch.softmax(logits, dim=-1) @ values


GEOMETRIES = [
    LayerGeometry(0.35),
    LayerGeometry(0.35, window=9),
    LayerGeometry(0.5, logit_softcap=2.0),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_drop_utility_is_exact_for_one_token(geometry: LayerGeometry) -> None:
    case = Case(geometry)
    found = case.utility().drop
    for kv_head in range(N_KV_HEADS):
        heads = range(kv_head * 3, kv_head * 3 + 3)
        for token in range(N_CONTEXT):
            lost = sum(
                case.weights[h]
                * ((case.outputs(h, without=token) - case.outputs(h)) ** 2).sum(-1).mean()
                for h in heads
            )
            assert found[kv_head, token] == pytest.approx(float(lost), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("sharpness", [30.0, 100.0])
def test_drop_utility_holds_where_one_token_has_nearly_all_attention(sharpness: float) -> None:
    case = Case(LayerGeometry(0.35), sharpness=sharpness)
    found = case.utility().drop
    p = torch.softmax(case.queries[0, 0] @ case.keys[:19, 0].T * 0.35, dim=-1)
    token = int(p[:N_CONTEXT].argmax())
    lost = sum(
        case.weights[h] * ((case.outputs(h, without=token) - case.outputs(h)) ** 2).sum(-1).mean()
        for h in range(3)
    )
    # 1 - p and v - o cancel together: at 1 - p = 1e-7 two digits of the answer are left.
    assert found[0, token] == pytest.approx(float(lost), rel=1e-2)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_key_utility_predicts_small_isotropic_errors(geometry: LayerGeometry) -> None:
    case = Case(geometry)
    token, kv_head, size = 12, 0, 1e-5
    lost = 0.0
    # The mean over directions of a quadratic form is that over any orthonormal basis.
    for direction in torch.eye(HEAD_DIM, dtype=torch.float64):
        keys = case.keys[:, kv_head].clone()
        keys[token] += size * direction
        for h in range(3):
            change = case.outputs(h, keys=keys) - case.outputs(h)
            lost += float(case.weights[h] * (change**2).sum(-1).mean()) / HEAD_DIM
    # First order: the next one is smaller by the size of the error.
    predicted = float(case.utility().key[kv_head, token])
    assert lost / size**2 == pytest.approx(predicted, rel=1e-4)


def test_value_utility_is_exact() -> None:
    case = Case(LayerGeometry(0.35))
    token, kv_head = 4, 1
    values = case.values[:, kv_head].clone()
    values[token, 2] += 0.25
    lost = sum(
        case.weights[h] * ((case.outputs(h, values=values) - case.outputs(h)) ** 2).sum(-1).mean()
        for h in range(3, 6)
    )
    predicted = float(case.utility().value[kv_head, token]) * 0.25**2
    assert predicted == pytest.approx(float(lost), rel=1e-9)


def test_tokens_out_of_a_sliding_window_cost_nothing() -> None:
    case = Case(LayerGeometry(0.35, window=9))
    utility = case.utility()
    first_query = N_TOKENS - N_QUERIES
    assert torch.all(utility.drop[:, : first_query - 8] == 0)
    assert torch.all(utility.drop[:, first_query - 8 :] > 0)
    assert torch.all(utility.key[:, : first_query - 8] == 0)


def test_mean_over_seeing_queries_does_not_punish_late_tokens() -> None:
    case = Case(LayerGeometry(0.35))
    case.positions = torch.arange(N_CONTEXT - N_QUERIES, N_CONTEXT)
    every, seeing = case.utility("all"), case.utility("seeing")
    # The last token is seen by the last query alone, the first by all.
    torch.testing.assert_close(seeing.drop[:, -1], N_QUERIES * every.drop[:, -1])
    torch.testing.assert_close(seeing.drop[:, 0], every.drop[:, 0])


def test_visibility_is_causal_and_counts_the_token_itself() -> None:
    seen = visible(torch.tensor([2]), 5, window=2)
    assert seen.tolist() == [[False, True, True, False, False]]
    assert visible(torch.tensor([2]), 5, window=0).tolist() == [[True, True, True, False, False]]
