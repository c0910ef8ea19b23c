"""Which form scores keys: what is asked for is given or refused, "auto" follows measurements."""

import pytest

from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.score_form import FILL_COST, TABLE_TIME_RATIO, table_heads
from sphkv_kernels.tier import PageError, TierFormat

QUAD = ((3, 2, 2, 2), "lloyd_max:2")
HALF = ((4, 2, 2, 2), "fp16")
SINGLE = ((5, 3, 3, 3), "lloyd_max:3")


def tier_of(bits: tuple[int, ...], radius: str, head_dim: int = 128) -> TierFormat:
    return TierFormat.spherical(SphericalCode.analytic("code", head_dim, bits, radius))


def chosen(tiers: tuple[TierFormat, ...], costs: tuple[int, ...], group_size: int = 1) -> int:
    return table_heads("auto", tiers, costs, 1, group_size, 128)


def test_auto_takes_tables_where_they_measured_faster_and_pay_for_their_filling() -> None:
    saved_share = 1 - TABLE_TIME_RATIO["quad", 1]
    enough = round(1.01 * FILL_COST / saved_share)
    assert chosen((tier_of(*QUAD),), (enough,)) == 1
    assert chosen((tier_of(*QUAD),), (round(0.98 * enough),)) == 0
    assert chosen((tier_of(*HALF),), (100 * enough,)) == 0  # measured slower
    # A tier that loses by tables outweighs one that gains.
    assert chosen((tier_of(*QUAD), tier_of(*HALF)), (enough, 2 * enough)) == 0
    assert chosen((tier_of(*QUAD), TierFormat.int8()), (enough, 2 * enough)) == 1


@pytest.mark.parametrize("group_size", [3, 4, 8, 16])
def test_groups_of_three_and_more_score_by_fragments(group_size: int) -> None:
    assert chosen((tier_of(*QUAD),), (1 << 40,), group_size) == 0
    with pytest.raises(PageError, match="groups of 1 and 2"):
        table_heads("table", (tier_of(*QUAD),), (1,), 1, group_size, 128)


def test_a_form_that_is_asked_for_is_given_or_refused() -> None:
    assert table_heads("fragment", (tier_of(*QUAD),), (1 << 40,), 1, 1, 128) == 0
    assert table_heads("table", (tier_of(*HALF),), (1,), 1, 2, 128) == 2
    for tier, head_dim in ((tier_of(*SINGLE), 128), (tier_of(*QUAD, 256), 256)):
        with pytest.raises(PageError, match="no key code"):
            table_heads("table", (tier,), (1,), 1, 1, head_dim)
    with pytest.raises(PageError, match="auto, fragment or table"):
        table_heads("both", (tier_of(*QUAD),), (1,), 1, 1, 128)  # type: ignore[arg-type]
