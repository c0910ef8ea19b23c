"""Which of two ways scores the keys of small groups, by what each was measured to take.

    fragment   keys are decoded to registers that meet the query in a matrix product
    table      the recursion runs on the query: a score is lookups into tables made from it

Tables serve groups of one and two query heads at head_dim 64 and 128 (`cuda/score_tables.cuh`);
keys of codes without one are scored by fragments in the same launch. A block fills its tables anew
for every row that it works on. Source: ours; the measured figures are named where they stand.
"""

from __future__ import annotations

from typing import Literal

from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.block_words import native_layout_of
from sphkv_kernels.layout import Scheme
from sphkv_kernels.tier import PageError, TierFormat
from sphkv_kernels.tier_dispatch import TABLE_HEAD_DIMS, has_query_table

ScoreForm = Literal["auto", "fragment", "table"]
MAX_TABLE_GROUP = 2

TABLE_TIME_RATIO: dict[tuple[Scheme, int], float] = {
    ("pair_half", 1): 1.065,
    ("pair_half", 2): 1.01,
    ("pair_nine_float", 1): 1.055,
    ("pair_nine_float", 2): 1.015,
    ("pair_swap", 1): 1.0,
    ("pair_swap", 2): 1.12,
    ("quad", 1): 0.937,
    ("quad", 2): 0.953,
}
"""Time by tables / time by fragments, by scheme and group size: one H100, cold L2, head_dim 128,
4 x 32 x 32768 x 1 and 4 x 16 x 32768 x 2 (NOTES.md has the microseconds)."""
FILL_COST = 30_000
"""What a block could read while it fills its tables (1.3 us, 1 x 32 x 1024 x 1), in bytes."""


def table_heads(
    form: ScoreForm,
    tiers: tuple[TierFormat, ...],
    tier_costs: tuple[int, ...],
    n_fills: int,
    group_size: int,
    head_dim: int,
) -> int:
    """Heads of the query tables that a plan uses: the group size, or 0 for fragments.

    tiers, tier_costs: the tiers that occur and the cost of all their pages (`page_cost`); n_fills:
    how many times a block begins a row. PageError where form is "table" and there can be none.
    """
    if form not in ("auto", "fragment", "table"):
        raise PageError(f"score_form {form!r} is not auto, fragment or table")
    able = [has_query_table(tier.key_format, head_dim) for tier in tiers]
    if form == "table":
        if group_size > MAX_TABLE_GROUP:
            raise PageError(
                f"score_form 'table' serves groups of 1 and 2 query heads per KV head, not "
                f"{group_size}; use 'auto'"
            )
        if not any(able):
            raise PageError(
                f"score_form 'table': no key code of this cache has query tables (they serve "
                f"4/2/2/2, 4/3/3/3 minifloat and 3/2/2/2 at head_dim {TABLE_HEAD_DIMS}); use 'auto'"
            )
        return group_size
    if form == "fragment" or group_size > MAX_TABLE_GROUP or not any(able):
        return 0
    saved = sum(
        cost * (1.0 - _ratio(tier, group_size))
        for tier, cost, is_able in zip(tiers, tier_costs, able, strict=True)
        if is_able
    )
    return group_size if saved > FILL_COST * n_fills else 0


def _ratio(tier: TierFormat, group_size: int) -> float:
    assert isinstance(tier.key_format, SphericalCode)
    layout = native_layout_of(tier.key_format)
    assert layout is not None
    return TABLE_TIME_RATIO.get((layout.scheme, group_size), 1.0)
