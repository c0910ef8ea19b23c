"""The fit chooses what it measured: sinks where there are some, the cheap frame in a tie."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sphkv_cli.artifacts.codebooks import CodebooksReader
from sphkv_cli.artifacts.fit_tables import FrameRow
from sphkv_cli.fit.frame_choice import _cheapest, _Tried
from sphkv_cli.fit.options import FitOptions
from sphkv_cli.fit.stage import fit_codebooks
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation

CODE = ("4/2/2/2/3",)
MEAN = 8 * np.eye(32)[0] + 4 * np.eye(32)[5]


def with_sinks(every: int) -> Callable[..., np.ndarray]:
    """Keys about a mean that all queries dislike; each `every`-th is short, and so preferred."""

    def draw(
        rng: np.random.Generator, kind: str, document: int, layer: int, shape: tuple[int, ...]
    ) -> np.ndarray:
        x = rng.standard_normal(shape)
        if kind == "keys":
            x += MEAN
            if every:
                # Few tokens, each far from the mean in its own direction.
                x[::every] = 1.2 * rng.standard_normal(x[::every].shape) / 4
        if kind == "queries":
            x -= 2.5 * MEAN
        return x

    return draw


def fitted(path: Path, output: Path, **options: object) -> CodebooksReader:
    fit_codebooks(FitOptions(codes=CODE, **options), path, output)
    return CodebooksReader.open(output)


@pytest.mark.parametrize("every", [0, 40])
def test_sinks_are_protected_where_there_are_some(
    make_capture: Callable[..., Path], tmp_path: Path, every: int
) -> None:
    capture = make_capture(draw=with_sinks(every), n_tokens=240, query_stride=5)
    sinks = fitted(capture, tmp_path / "c.h5", centring="post_rope").sinks
    assert sinks is not None
    assert (sinks.factor > 0) == (every > 0)
    assert sinks.median_norm == pytest.approx(np.linalg.norm(MEAN), rel=0.2)


def test_isotropic_keys_need_nothing(tiny_capture: Path, tmp_path: Path) -> None:
    reader = fitted(tiny_capture, tmp_path / "c.h5")
    assert reader.frames.balancing is None
    assert reader.sinks is not None and reader.sinks.factor == 0
    worst = max(row.worst_output_error for row in reader.tables.frames if row.is_chosen)
    assert worst < 1


def row(error: float, worst: float = 0.5) -> FrameRow:
    return FrameRow(0, "none", 0, "none", error, worst, 0, 0)


@pytest.mark.parametrize(
    ("rows", "prices", "chosen"),
    [
        ([row(1.02), row(1.0)], [1, 1], 0),  # within noise: the cheap one
        ([row(1.05), row(1.0)], [1, 1], 1),
        ([row(1.3), row(1.0)], [1, 1.41], 0),  # not worth its bytes
        ([row(0.1, worst=1.2), row(0.2)], [1, 1], 1),  # a head is lost
        ([row(0.3, worst=1.2), row(0.2, worst=1.1)], [1, 1], 1),  # heads are lost either way
    ],
)
def test_the_cheapest_of_the_best_is_taken_and_a_lost_head_vetoes(
    rows: list[FrameRow], prices: list[float], chosen: int
) -> None:
    frame = FrameSet(Rotation("none", 32))
    tried = [_Tried(frame, *pair) for pair in zip(rows, prices, strict=True)]
    assert _cheapest(tried) is tried[chosen]
