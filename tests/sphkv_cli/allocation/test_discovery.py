"""What is said to be found is there: a planted sink, a planted tail."""

from pathlib import Path

import numpy as np
import pytest

from sphkv_cli.allocation.discovery import Discovery
from sphkv_cli.allocation.figure import discovery_figure
from sphkv_cli.allocation.layout import PageLayout, order_tiers
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.tier import TierFormat

LOW = SphericalCode.analytic("low", 32, (3, 1, 1, 1), "lloyd_max:1")
LAYOUT = PageLayout(
    order_tiers([TierFormat.spherical(LOW), TierFormat.int8()], 32, 16),
    head_dim=32,
    page_size=16,
    n_kv_heads=2,
    stores_positions=(False, False, False),
    fixed_bytes=0,
)


def planted(n_context: int = 100) -> np.ndarray:
    """Everything dropped, token 7 protected in four of six heads, the last four coded."""
    plan = np.zeros((3, 2, n_context), dtype=np.int8)
    plan[:2, :, 7] = 2
    plan[:, :, -4:] = 1
    return plan


def test_a_planted_sink_is_the_only_one_found() -> None:
    found = Discovery.of_plans(LAYOUT, ["a", "b"], [planted(), planted(70) * 0])
    assert found.n_sinks == 1
    (sink,) = found.sinks
    assert (sink.document, sink.position) == ("a", 7)
    assert sink.share == pytest.approx(4 / 6)


def test_profiles_cover_every_position_once_and_see_both_ends() -> None:
    found = Discovery.of_plans(LAYOUT, ["a"], [planted()])
    low = float(8 * LAYOUT.option_bytes()[0, 1] / (2 * 32 * 16))
    for end in ("start", "end"):
        rows = found.profile(end)
        covered = [t for row in rows for t in range(row.first, row.last + 1)]
        assert covered == list(range(100))
        assert all(0 <= row.dropped <= 1 for row in rows)
    last = found.profile("end")
    assert [(row.first, row.last) for row in last[:4]] == [(0, 0), (1, 1), (2, 3), (4, 7)]
    assert all(row.bits_per_coordinate == pytest.approx(low) for row in last[:3])
    assert last[3].dropped == 1
    fourth = found.profile("start")[3]
    # Token 7 alone of positions 4 to 7, in four of six heads.
    assert fourth.protected == pytest.approx(4 / 6 / 4)


def test_the_figure_shows_every_head(allocation, tmp_path: Path) -> None:
    from sphkv_cli.plots.draw import draw

    result, _ = allocation
    figure = discovery_figure(result.summary)
    bits = np.array(figure.panels[0].values)
    assert bits.shape == (2, 2)
    mean = np.mean([head.bits_per_coordinate for head in result.summary.heads])
    assert bits.mean() == pytest.approx(mean)
    draw(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
