"""The search finds the best code of its space, and never one that cannot exist."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_codebooks.density import analytic_density
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.level_tradeoff import depth_frontiers, self_gains
from sphkv_codebooks.lloyd_max import lloyd_max
from sphkv_codebooks.radius import radius_coding_from_spec
from sphkv_codebooks.search import (
    SearchSpace,
    best_code,
    best_codes,
    frontier,
    gaussian_limit,
)

# Best polar codes of an independent trial, head_dim 128, one float16 norm or Lloyd-Max radii.
PUBLISHED = {2.0: 0.1461, 2.5: 0.0766, 3.0: 0.0396, 3.5: 0.0203, 4.0: 0.0103}


@pytest.mark.parametrize(("rate", "distortion"), PUBLISHED.items())
def test_finds_codes_as_good_as_the_best_known(rate: float, distortion: float) -> None:
    found = best_code(SearchSpace(128, full_depth_radii=("norm",)), rate)
    assert found.rate <= rate
    assert found.distortion <= distortion + 5e-5  # the table has four decimals


def test_a_minifloat_norm_saves_more_than_it_costs() -> None:
    for rate in PUBLISHED:
        norm = best_code(SearchSpace(128, full_depth_radii=("norm",)), rate)
        assert best_code(SearchSpace(128), rate).distortion < 0.96 * norm.distortion


@pytest.mark.parametrize("rate", [2.0, 2.8, 3.3, 4.1])
def test_equals_brute_force_over_a_small_family(rate: float) -> None:
    head_dim, most = 8, 24
    gains = [
        np.array(
            [
                lloyd_max(analytic_density(level), n).self_gain(analytic_density(level))
                for n in range(1, most + 1)
            ]
        )
        for level in (1, 2, 3)
    ]
    best = {}
    for depth in (1, 2, 3):
        cells = np.array(list(itertools.product(range(1, most + 1), repeat=depth)))
        cells = cells[cells[:, 0] > 1]
        gain = np.prod([gains[i][cells[:, i] - 1] for i in range(depth)], axis=0)
        bits = np.log2(cells) @ (head_dim / 2.0 ** np.arange(1, depth + 1))
        for radius in ("norm", "minifloat:5,3") if depth == 3 else ("fp16", "lloyd_max:2"):
            coding = radius_coding_from_spec(radius, 1 << depth, head_dim)
            moments = coding.moments(1 << depth, head_dim)
            n_radii = head_dim >> depth
            total = bits + n_radii * coding.bits_per_radius + coding.norm_bits
            distortion = 1 + moments.mean_square - 2 * moments.correlation * gain
            distortion[total > rate * head_dim] = np.inf
            if np.isfinite(distortion).any():
                best[depth, radius] = distortion.min()
    space = SearchSpace(
        head_dim,
        block_radii=("fp16", "lloyd_max:2"),
        full_depth_radii=("norm", "minifloat:5,3"),
    )
    found = {(code.depth, code.radius): code for code in best_codes(space, rate)}
    # No best code of so low a rate needs more than `most` cells.
    assert all(max(code.n_cells) < most for code in found.values())
    assert found.keys() == best.keys()
    for family, code in found.items():
        assert code.distortion == pytest.approx(best[family], rel=1e-12)


@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_more_rate_never_hurts_and_never_beats_the_gaussian_limit(head_dim: int) -> None:
    codes = frontier(SearchSpace(head_dim), 1.5, 5.0)
    assert len(codes) > 100
    for before, after in itertools.pairwise(codes):
        assert before.rate < after.rate
        assert before.distortion > after.distortion
    assert all(code.distortion > gaussian_limit(code.rate) for code in codes)


@settings(max_examples=25, deadline=None)
@given(
    head_dim=st.sampled_from([32, 64, 128]),
    rate=st.floats(1.5, 5.0),
    cells=st.sampled_from(["any", "powers_of_two"]),
)
def test_every_found_code_keeps_its_promise(head_dim: int, rate: float, cells: str) -> None:
    space = SearchSpace(head_dim, cells=cells)  # type: ignore[arg-type]
    for design in best_codes(space, rate, 3):
        code = design.build("found")
        assert code.code_rate == pytest.approx(design.rate, abs=1e-9)
        assert design.rate <= rate + 1e-9
        assert code.distortion() == pytest.approx(design.distortion, rel=1e-9)
        assert cells == "any" or design.has_whole_bits


def test_the_frontier_passes_through_the_best_code_of_every_rate() -> None:
    space = SearchSpace(64)
    codes = frontier(space, 2.0, 4.5)
    for rate in (2.25, 3.125, 3.25, 4.25):
        below = [code for code in codes if code.rate <= rate]
        assert below[-1].distortion == pytest.approx(best_code(space, rate).distortion, rel=1e-12)


def test_any_number_of_cells_is_never_worse_than_powers_of_two() -> None:
    for rate in (2.25, 3.0, 3.25, 4.25):
        whole = best_code(SearchSpace(64, cells="powers_of_two"), rate)
        assert best_code(SearchSpace(64), rate).distortion <= whole.distortion


def test_undominated_choices_are_all_kept() -> None:
    for depth_frontier in depth_frontiers(16, 4.0):
        bits, loss = depth_frontier.bits, depth_frontier.loss
        assert (np.diff(bits) >= 0).all()
        assert (np.diff(loss) < 0).all()
        gains = np.prod(
            [
                self_gains(level)[depth_frontier.n_cells[:, level - 1] - 1]
                for level in range(1, depth_frontier.depth + 1)
            ],
            axis=0,
        )
        assert np.exp(-loss) == pytest.approx(gains, rel=1e-12)


def test_a_rate_below_every_code_is_refused() -> None:
    with pytest.raises(CodeError, match="no code of head_dim 64"):
        best_code(SearchSpace(64), 0.2)
    with pytest.raises(CodeError, match="bits above 0"):
        best_codes(SearchSpace(64), -1.0)
    with pytest.raises(CodeError, match="depth 7"):
        SearchSpace(64, depths=(7,))
