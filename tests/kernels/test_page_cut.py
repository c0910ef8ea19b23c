"""Pages are cut where the slowest block is fastest, checked against every possible cut."""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphkv_kernels.page_cut import PART_COST, SEGMENT_COST, Ints, assign_blocks


def slowest(block: Ints, rows: Ints, tiers: Ints, cost: Ints) -> float:
    """Time of the slowest block, added up page by page."""
    total: dict[int, float] = {}
    seen: set[tuple[int, int]] = set()
    segments: set[tuple[int, int, int]] = set()
    for b, row, tier, page in zip(block, rows, tiers, cost, strict=True):
        time = float(page)
        if (b, row) not in seen:
            time += PART_COST
        if (b, row, tier) not in segments:
            time += SEGMENT_COST
        seen.add((b, row))
        segments.add((b, row, tier))
        total[int(b)] = total.get(int(b), 0.0) + time
    return max(total.values())


pages = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 900_000)), min_size=1, max_size=9
)


@settings(max_examples=80, deadline=None)
@given(pages, st.integers(1, 4))
def test_no_cut_is_faster(drawn: list[tuple[int, int, int]], n_blocks: int) -> None:
    table = np.array(sorted(drawn, key=lambda page: page[:2]), dtype=np.int64)
    rows, tiers, cost = table[:, 0], table[:, 1], table[:, 2]
    block = assign_blocks(rows, tiers, cost, 3, n_blocks, worth=1.0)
    assert (np.diff(block) >= 0).all() and block.min() >= 0 and block.max() < n_blocks
    best = min(
        slowest(np.searchsorted(cuts, np.arange(len(cost)), "right"), rows, tiers, cost)
        for cuts in combinations_with_replacement(range(len(cost) + 1), n_blocks - 1)
    )
    assert slowest(block, rows, tiers, cost) <= 1.0051 * best


@pytest.mark.parametrize("worth", [0.9, 0.98])
def test_rows_are_split_only_for_a_gain_that_is_worth_it(worth: float) -> None:
    # Four rows on five blocks: whole rows leave one idle, a cut anywhere makes all of them work.
    rows = np.repeat(np.arange(4), 300)
    tiers, cost = np.zeros_like(rows), np.full(rows.size, 100_000)
    whole = assign_blocks(rows, tiers, cost, 4, 5, worth=0.8)
    assert set(np.flatnonzero(np.diff(whole)) + 1) == {300, 600, 900}
    split = assign_blocks(rows, tiers, cost, 4, 5, worth=worth)
    assert np.unique(split).size == 5
    gain = slowest(split, rows, tiers, cost) / slowest(whole, rows, tiers, cost)
    assert 0.8 < gain < 0.82
