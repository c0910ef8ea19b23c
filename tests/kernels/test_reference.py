"""Laws of the float64 reference: it is softmax attention, from codes that are never rebuilt."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_codebooks.encoded import EncodedVectors
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotary import keep_strongest_pairs
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels import page_logits
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.cache_builder import build_cache
from sphkv_kernels.page_slots import SequenceTokens
from sphkv_kernels.position_term import PositionTerm
from sphkv_kernels.reference import (
    DecodeResult,
    ada_decode_reference,
    ada_logits_reference,
    merge_partial,
)
from sphkv_kernels.tier import PageError, TierFormat
from sphkv_kernels.vectors import decode_vectors, encode_vectors
from tests.kernels.cases import native_tiers, random_tokens

TIERS = native_tiers(64)
SCALE = 64**-0.5


def decoded_dense(tiers: tuple[TierFormat, ...], tokens: SequenceTokens) -> SequenceTokens:
    """The same tokens with keys and values replaced by float64 decodes of their own tier."""
    keys, values = tokens.keys.to(torch.float64), tokens.values.to(torch.float64)
    for index, tier in enumerate(tiers):
        rows = torch.nonzero(tokens.tier_of_token == index, as_tuple=True)
        for x, out, region_format in (
            (tokens.keys, keys, tier.key_format),
            (tokens.values, values, tier.value_format),
        ):
            out[rows] = decode_vectors(region_format, encode_vectors(region_format, x[rows]))
    return replace(tokens, keys=keys, values=values)


def plain_attention(
    query: torch.Tensor,
    tokens: SequenceTokens,
    scale: float,
    *,
    seen: torch.Tensor | None = None,
    softcap: float = 0.0,
    offset: torch.Tensor | None = None,
) -> DecodeResult:
    """Softmax attention of one query ``(n_q_heads, head_dim)`` in float64, head by head."""
    n_q_heads, head_dim = query.shape
    group_size = n_q_heads // tokens.keys.shape[1]
    output = torch.zeros((n_q_heads, head_dim), dtype=torch.float64)
    lse = torch.full((n_q_heads,), -torch.inf, dtype=torch.float64)
    for head in range(n_q_heads):
        kept = tokens.tier_of_token[:, head // group_size] >= 0
        if seen is not None:
            kept = kept & seen
        if not bool(kept.any()):
            continue
        logits = tokens.keys[kept, head // group_size].to(torch.float64) @ query[head].double()
        if offset is not None:
            logits = logits + offset[head].double()
        scores = logits * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        lse[head] = torch.logsumexp(scores, 0)
        values = tokens.values[kept, head // group_size].to(torch.float64)
        output[head] = torch.softmax(scores, 0) @ values
    return DecodeResult(output, lse)


def stacked(parts: list[DecodeResult]) -> DecodeResult:
    return DecodeResult(
        torch.stack([p.output for p in parts]), torch.stack([p.log_sum_exp for p in parts])
    )


def assert_close(actual: DecodeResult, expected: DecodeResult, tolerance: float = 1e-12) -> None:
    """1e-12: float64 rounding of sums over at most a few hundred terms of order one."""
    torch.testing.assert_close(actual.output, expected.output, rtol=0, atol=tolerance)
    torch.testing.assert_close(actual.log_sum_exp, expected.log_sum_exp, rtol=0, atol=tolerance)


def random_query(n_sequences: int, n_q_heads: int, head_dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n_sequences, n_q_heads, head_dim), generator=generator)


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.sampled_from((0, 1, 15, 16, 17, 63, 65)), min_size=1, max_size=3),
    group_size=st.sampled_from((1, 3, 4)),
    page_size=st.sampled_from((16, 32, 64)),
    seed=st.integers(0, 2**31),
)
def test_decode_equals_plain_softmax_attention_on_the_decoded_vectors(
    lengths: list[int], group_size: int, page_size: int, seed: int
) -> None:
    sequences = [
        random_tokens(n, 2, 64, len(TIERS), page_size, seed + i) for i, n in enumerate(lengths)
    ]
    cache = build_cache(TIERS, page_size, sequences, dead_rows="poison")
    query = random_query(len(lengths), 2 * group_size, 64, seed)
    expected = stacked(
        [
            plain_attention(q, decoded_dense(TIERS, s), SCALE)
            for q, s in zip(query, sequences, strict=True)
        ]
    )
    assert_close(ada_decode_reference(query, cache, SCALE), expected)


@pytest.mark.parametrize("n_tokens", [1, 15, 16, 17, 63, 65])
@pytest.mark.parametrize("tier", TIERS, ids=lambda tier: tier.name)
def test_single_tiers_at_odd_lengths(tier: TierFormat, n_tokens: int) -> None:
    tokens = random_tokens(n_tokens, 1, 64, 1, 16, seed=n_tokens, drop_fraction=0.0)
    cache = build_cache((tier,), 16, [tokens], dead_rows="poison")
    query = random_query(1, 2, 64, seed=n_tokens)
    expected = stacked([plain_attention(query[0], decoded_dense((tier,), tokens), SCALE)])
    assert_close(ada_decode_reference(query, cache, SCALE), expected)


@pytest.mark.parametrize("pairing", ["adjacent", "rope"])
@pytest.mark.parametrize(
    ("head_dim", "n_cells", "radius"),
    [
        (64, (16, 4, 4, 4), "fp16"),
        (128, (12, 5, 3, 3), "lloyd_max:2"),
        (64, (16, 4, 4, 4, 4, 8), "norm"),
        (8, (16,), "lloyd_max:2"),
        (256, (16, 8, 8, 8), "minifloat:5,6"),
        (16, (1, 4), "minifloat:4,4"),
    ],
)
def test_logits_are_the_angle_domain_recursion_and_the_dense_dot_product(
    head_dim: int, n_cells: tuple[int, ...], radius: str, pairing: str
) -> None:
    code = SphericalCode.analytic(
        "code",
        head_dim,
        radius=radius,
        n_cells=n_cells,
        pairing=pairing,  # type: ignore[arg-type]
    )
    tier = TierFormat.spherical(code)
    tokens = random_tokens(21, 1, head_dim, 1, 16, seed=3, drop_fraction=0.0)
    cache = build_cache((tier,), 16, [tokens])
    query = random_query(1, 3, head_dim, seed=4)
    logits = ada_logits_reference(query, cache).pages  # (2 pages, 3 heads, 16)
    actual = torch.cat([logits[0], logits[1, :, :5]], dim=1)
    encoded = code.encode(tokens.keys[:, 0])
    recursion = code.angle_domain_dot(query[0][:, None, :], encoded[None])
    dense = query[0].double() @ code.decode(encoded, torch.float64).T
    bound = query[0].double().norm(dim=-1).max() * tokens.keys.norm(dim=-1).max()
    assert float((actual - recursion).abs().max()) <= 1e-12 * float(bound)
    assert float((actual - dense).abs().max()) <= 1e-12 * float(bound)


def test_spherical_keys_are_never_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    code = SphericalCode.analytic("code", 64, (4, 2, 2, 2), "fp16")
    tokens = random_tokens(40, 1, 64, 1, 16, seed=3, drop_fraction=0.0)
    cache = build_cache((TierFormat.spherical(code),), 16, [tokens])
    query = random_query(1, 2, 64, seed=4)
    expected = ada_logits_reference(query, cache).pages

    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("a spherical key was decoded to coordinates")

    monkeypatch.setattr(SphericalCode, "decode", refuse)
    monkeypatch.setattr(page_logits, "decode_vectors", refuse)
    assert torch.equal(ada_logits_reference(query, cache).pages, expected)
    with pytest.raises(AssertionError, match="decoded to coordinates"):
        ada_decode_reference(query, cache, SCALE)  # values are: their sum is a vector


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_a_mixed_cache_is_the_merge_of_its_tiers(seed: int) -> None:
    tokens = random_tokens(130, 2, 64, len(TIERS), 32, seed)
    query = random_query(1, 4, 64, seed)
    parts = []
    for index in range(len(TIERS)):
        tier = torch.where(tokens.tier_of_token == index, index, -1)
        alone = build_cache(TIERS, 32, [replace(tokens, tier_of_token=tier)])
        parts.append(ada_decode_reference(query, alone, SCALE))
    mixed = ada_decode_reference(query, build_cache(TIERS, 32, [tokens]), SCALE)
    assert_close(merge_partial(parts), mixed)


def test_a_sequence_without_live_tokens_returns_zeros_and_minus_infinity() -> None:
    empty = random_tokens(0, 2, 64, 1, 16, seed=0)
    dropped = random_tokens(9, 2, 64, 1, 16, seed=0, drop_fraction=1.1)
    some = random_tokens(9, 2, 64, 1, 16, seed=0, drop_fraction=0.0)
    query = random_query(3, 4, 64, seed=1)
    result = ada_decode_reference(query, build_cache(TIERS, 16, [empty, dropped, some]), SCALE)
    assert torch.equal(result.output[:2], torch.zeros(2, 4, 64, dtype=torch.float64))
    assert bool(torch.isneginf(result.log_sum_exp[:2]).all())
    assert bool(torch.isfinite(result.output).all() and torch.isfinite(result.log_sum_exp[2]).all())
    merged = merge_partial([result, result])  # -inf with -inf stays -inf, not NaN
    assert torch.equal(merged.output[:2], result.output[:2])
    assert bool(torch.isneginf(merged.log_sum_exp[:2]).all())


def test_dead_rows_and_dead_slots_never_reach_the_result() -> None:
    sequences = [random_tokens(50, 2, 64, len(TIERS), 16, seed=i) for i in range(2)]
    clean = build_cache(TIERS, 16, sequences)
    poisoned = build_cache(TIERS, 16, sequences, dead_rows="poison")
    assert not torch.equal(clean.pool, poisoned.pool)
    query = random_query(2, 4, 64, seed=1)
    expected = ada_decode_reference(query, clean, SCALE)
    assert_close(ada_decode_reference(query, poisoned, SCALE), expected, 0.0)

    table = clean.page_table  # one dead slot in front of every head's entries
    n_heads = table.starts.shape[0] - 1
    heads = torch.cat([torch.arange(n_heads), table.head_of_entry()])
    order = torch.argsort(heads, stable=True)
    dead = replace(
        table,
        offsets=torch.cat([torch.full((n_heads,), 1 << 62), table.offsets])[order],
        tiers=torch.cat([torch.full((n_heads,), 117, dtype=torch.int8), table.tiers])[order],
        live_tokens=torch.cat([torch.zeros(n_heads, dtype=torch.int16), table.live_tokens])[order],
        starts=table.starts + torch.arange(n_heads + 1, dtype=torch.int32),
    )
    assert_close(
        ada_decode_reference(query, replace(clean, page_table=dead, positions=None), SCALE),
        expected,
        0.0,
    )


def test_poison_does_reach_a_reader_that_trusts_a_dead_row() -> None:
    """The poison is not vacuous: one live token too many turns the result into NaN."""
    for tier in TIERS:
        tokens = random_tokens(5, 1, 64, 1, 16, seed=2, drop_fraction=0.0)
        cache = build_cache((tier,), 16, [tokens], dead_rows="poison")
        query = random_query(1, 1, 64, seed=3)
        right = ada_decode_reference(query, cache, SCALE)
        table = replace(cache.page_table, live_tokens=cache.page_table.live_tokens + 1)
        trusting = replace(cache, page_table=table)
        if tier.key_code is not None and tier.key_code.radius_coding.spec == "minifloat:5,6":
            with pytest.raises(IndexError):  # the poison is the code that no value has
                ada_decode_reference(query, trusting, SCALE)
            continue
        wrong = ada_decode_reference(query, trusting, SCALE)
        assert bool(torch.isfinite(right.output).all())
        assert bool(wrong.output.isnan().any())


def with_tail(
    cache: PagedCache, keys: torch.Tensor, values: torch.Tensor, used: list[int]
) -> PagedCache:
    return replace(
        cache,
        tail_keys=keys,
        tail_values=values,
        tail_tokens=torch.tensor(used, dtype=torch.int32),
        tail_positions=torch.tensor([100] * len(used), dtype=torch.int32),
    )


@pytest.mark.parametrize("window", [0, 40])
def test_tail_window_offset_and_softcap_match_plain_attention(window: int) -> None:
    sequences = [random_tokens(n, 2, 64, len(TIERS), 16, seed=n) for n in (100, 30)]
    generator = torch.Generator().manual_seed(9)
    shape = (2, 2, 8, 64)
    tail_keys = torch.randn(shape, generator=generator).to(torch.bfloat16)
    tail_values = torch.randn(shape, generator=generator).to(torch.bfloat16)
    used = [5, 0]
    for s, n in enumerate(used):
        tail_keys[s, :, n:] = torch.nan
        tail_values[s, :, n:] = torch.nan
    cache = with_tail(build_cache(TIERS, 16, sequences), tail_keys, tail_values, used)
    query = random_query(2, 4, 64, seed=5)
    offset = torch.randn((2, 4), generator=generator)
    now = torch.tensor([105, 60])
    parts = []
    for s, tokens in enumerate(sequences):
        dense = decoded_dense(TIERS, tokens)
        n = used[s]
        joined = SequenceTokens(
            torch.cat([dense.keys, tail_keys[s, :, :n].transpose(0, 1).double()]),
            torch.cat([dense.values, tail_values[s, :, :n].transpose(0, 1).double()]),
            torch.cat([dense.tier_of_token, torch.zeros((n, 2), dtype=torch.int8)]),
            torch.zeros((tokens.keys.shape[0] + n, 2)),
        )
        positions = torch.cat([torch.arange(tokens.keys.shape[0]), 100 + torch.arange(n)])
        seen = (now[s] - positions < window) if window else torch.ones_like(positions).bool()
        parts.append(
            plain_attention(query[s], joined, SCALE, seen=seen, softcap=2.0, offset=offset[s])
        )
    actual = ada_decode_reference(
        query,
        cache,
        SCALE,
        logit_offset=offset,
        logit_softcap=2.0,
        window=window,
        query_positions=now,
    )
    assert_close(actual, stacked(parts))


@pytest.mark.parametrize("position_dtype", [torch.int32, torch.uint16])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (40, 2.0)])
def test_the_position_term_gives_back_the_logits_of_keys_centred_before_rope(
    position_dtype: torch.dtype, window: int, softcap: float
) -> None:
    """Dense pages and tail hold k - R_t mu in the frame; the decode must see the logits of k."""
    generator = torch.Generator().manual_seed(3)
    frames = turned_frames(64, n_pairs=5)
    n_tokens, n_tail = 50, 7
    positions = torch.arange(n_tokens + n_tail) + 300
    keys = torch.randn((n_tokens + n_tail, 2, 64), generator=generator, dtype=torch.float64)
    values = torch.randn((n_tokens + n_tail, 2, 64), generator=generator, dtype=torch.float64)
    framed = frames.keys_to_frame(0, keys, positions)
    tail_keys = framed[n_tokens:].to(torch.bfloat16)
    in_frame = frames.values_to_frame(values)
    tail_values = in_frame[n_tokens:].to(torch.bfloat16)
    tokens = SequenceTokens(
        framed[:n_tokens],
        in_frame[:n_tokens],
        torch.zeros((n_tokens, 2), dtype=torch.int8),
        (torch.randperm(n_tokens, generator=generator) // 16)[:, None].expand(-1, 2),
        positions[:n_tokens],
    )
    dense = (TierFormat.dense(),)
    cache = build_cache(dense, 16, [tokens], position_dtype=position_dtype)
    cache = replace(
        cache,
        tail_keys=tail_keys.transpose(0, 1)[None].contiguous(),
        tail_values=tail_values.transpose(0, 1)[None].contiguous(),
        tail_tokens=torch.tensor([n_tail], dtype=torch.int32),
        tail_positions=torch.tensor([300 + n_tokens], dtype=torch.int32),
    )
    query = torch.randn((1, 4, 64), generator=generator, dtype=torch.float64)
    # What bf16 pages hold, back in the model's space: there the logits must be plain ones.
    held = frames.keys_from_frame(0, framed.to(torch.bfloat16).double(), positions)
    now = torch.tensor([300 + n_tokens + n_tail - 1])
    seen = (now[0] - positions < window) if window else torch.ones_like(positions).bool()
    joined = SequenceTokens(
        held,
        in_frame.to(torch.bfloat16).double(),
        torch.zeros((n_tokens + n_tail, 2), dtype=torch.int8),
        torch.zeros((n_tokens + n_tail, 2)),
    )
    expected = plain_attention(query[0], joined, SCALE, seen=seen, softcap=softcap)
    inside = frames.queries_to_frame(0, query)

    def decode(term: PositionTerm | None) -> DecodeResult:
        return ada_decode_reference(
            inside,
            cache,
            SCALE,
            logit_softcap=softcap,
            window=window,
            query_positions=now,
            position_term=term,
        )

    actual = decode(PositionTerm.of(frames, 0, query))
    assert_close(actual, stacked([expected]), 1e-10)
    forgotten = decode(None)
    assert float((forgotten.output - actual.output).norm() / actual.output.norm()) > 0.1
    assert PositionTerm.of(frames, 1, query) is None


def test_a_position_term_that_cannot_be_is_refused_in_words() -> None:
    frames = turned_frames(64, n_pairs=2)
    tokens = random_tokens(20, 2, 64, len(TIERS), 16, seed=0)
    without = build_cache(TIERS, 16, [replace(tokens, positions=None)])
    query = torch.zeros(1, 4, 64)
    term = PositionTerm.of(frames, 0, query)
    assert term is not None and term.n_pairs == 2
    with pytest.raises(PageError, match="needs a cache built with positions"):
        ada_decode_reference(query, without, SCALE, position_term=term)
    cache = build_cache(TIERS, 16, [replace(tokens, positions=torch.arange(20))])
    with pytest.raises(PageError, match="position_term is for 1 sequences, 4 query and 2 KV heads"):
        ada_decode_reference(torch.zeros(1, 2, 64), cache, SCALE, position_term=term)
    with pytest.raises(PageError, match="do not fit, expected"):
        PositionTerm(torch.zeros(1, 4, 2, 3), torch.zeros(2, 4))
    with pytest.raises(PageError, match=r"cannot be stored as torch\.uint16"):
        late = replace(tokens, positions=torch.arange(20) + 65530)
        build_cache(TIERS, 16, [late], position_dtype=torch.uint16)


def turned_frames(head_dim: int, n_pairs: int) -> FrameSet:
    """Layer 0 is centred before RoPE by a large mean of n_pairs pairs, layer 1 is not centred."""
    rng = np.random.default_rng(5)
    mean = 4 * rng.standard_normal((2, 2, head_dim)).astype(np.float32)
    mean[0] = keep_strongest_pairs(mean[0], n_pairs)
    mean[1] = 0
    inv_freq = 1e4 ** -np.linspace(0, 1, head_dim // 2)
    return FrameSet(
        Rotation("hadamard", head_dim, 1),
        ("pre_rope", "none"),
        mean,
        inv_freq=np.tile(inv_freq, (2, 1)).astype(np.float32),
    )


def test_many_queries_share_the_pages_of_one_context() -> None:
    tokens = random_tokens(80, 2, 64, len(TIERS), 32, seed=0)
    cache = build_cache(TIERS, 32, [tokens])
    queries = random_query(6, 4, 64, seed=1)
    together = ada_decode_reference(queries, cache.select_sequences([0] * 6), SCALE)
    alone = [ada_decode_reference(q[None], cache, SCALE) for q in queries]
    expected = DecodeResult(
        torch.cat([a.output for a in alone]), torch.cat([a.log_sum_exp for a in alone])
    )
    assert_close(together, expected, 1e-13)


@pytest.mark.parametrize("spread", [0.0, 1e4])
def test_extreme_logits_stay_finite(spread: float) -> None:
    tokens = random_tokens(65, 1, 64, len(TIERS), 16, seed=0)
    cache = build_cache(TIERS, 16, [tokens])
    result = ada_decode_reference(random_query(1, 2, 64, 0) * spread, cache, 1.0)
    assert bool(torch.isfinite(result.output).all() and torch.isfinite(result.log_sum_exp).all())
    expected = plain_attention(
        random_query(1, 2, 64, 0)[0] * spread, decoded_dense(TIERS, tokens), 1.0
    )
    # Logits of 1e5 carry an absolute rounding of 1e5 * 2^-52 * (sums of 64), hence 1e-8.
    torch.testing.assert_close(result.output[0], expected.output, rtol=1e-8, atol=1e-8)


def test_wrong_queries_are_refused_with_their_shape() -> None:
    cache = build_cache(TIERS, 16, [random_tokens(5, 2, 64, 1, 16, seed=0)])
    with pytest.raises(PageError, match=r"query is \(2, 4, 64\)"):
        ada_decode_reference(torch.zeros(2, 4, 64), cache, SCALE)
    with pytest.raises(PageError, match="3 query heads do not divide"):
        ada_decode_reference(torch.zeros(1, 3, 64), cache, SCALE)
    with pytest.raises(PageError, match="logit_offset is"):
        ada_logits_reference(torch.zeros(1, 4, 64), cache, logit_offset=torch.zeros(1, 3))
    with pytest.raises(PageError, match="needs query_positions"):
        ada_decode_reference(torch.zeros(1, 4, 64), cache, SCALE, window=4)


def test_encoded_vectors_reach_the_pages_unchanged() -> None:
    """What the cache stores is exactly what the code encodes: the reference adds no rounding."""
    code = SphericalCode.analytic("code", 64, (4, 2, 2, 2), "lloyd_max:2")
    x = torch.randn((16, 64), generator=torch.Generator().manual_seed(0))
    encoded = code.encode(x)
    assert isinstance(encode_vectors(code, x), EncodedVectors)
    again = encode_vectors(code, x.to(torch.float64))
    assert isinstance(again, EncodedVectors)
    for a, b in zip(encoded.angle_codes, again.angle_codes, strict=True):
        assert torch.equal(a, b)
