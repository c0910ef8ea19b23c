"""Laws of the kernel's lookup tables that no GPU is needed for."""

import numpy as np
import pytest

from sphkv_codebooks.radius import LloydMaxRadius
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.block_words import native_layout_of
from sphkv_kernels.lookup_tables import code_tables, wide_tables
from sphkv_kernels.table_space import ROW_BYTES, TableSpace

HALF_ROUNDING = 2.0**-10  # one table rounds the product once, the other its two factors


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_wide_weights_are_narrow_weights_times_the_radius(head_dim: int) -> None:
    code = SphericalCode.analytic("code", head_dim, (4, 2, 2, 2), "lloyd_max:2")
    layout = native_layout_of(code)
    assert layout is not None
    assert isinstance(code.radius_coding, LloydMaxRadius)
    narrow = code_tables(code, layout).shared[1].astype(np.float64)
    halves = wide_tables(code, layout)
    for radius_code, centroid in enumerate(code.radius_coding.centroids):
        rows = halves[radius_code & 1][256 * (radius_code >> 1) :][:256].astype(np.float64)
        expected = narrow * centroid / np.sqrt(code.n_radii)
        assert np.abs(rows - expected).max() <= HALF_ROUNDING * np.abs(expected).max()


def test_tables_never_overlap_and_equal_ones_are_stored_once() -> None:
    generator = np.random.default_rng(5)
    space = TableSpace(16)
    taken: set[tuple[int, int]] = set()

    def take(offset: int, n_rows: int) -> None:
        column, first = offset % ROW_BYTES, offset // ROW_BYTES
        cells = {(column, row) for row in range(first, first + n_rows)}
        assert column in (0, 128)
        assert not cells & taken
        taken.update(cells)

    tables = [generator.random((n, 4)).astype(np.float16) for n in (256, 8, 512, 512, 256)]
    take(space.place(tables[0]), 256)
    take(space.place(tables[1], turned=True), 8)
    assert space.place(tables[0]) == 0
    both = space.place_side_by_side(tables[2], tables[3])
    take(both, 512)
    take(both + 128, 512)
    assert space.place_side_by_side(tables[2], tables[3]) == both
    take(space.place(tables[0], turned=True), 256)  # other bytes in half of its copies
    take(space.reserve(256), 256)
    take(space.place(tables[4]), 256)
    assert space.n_bytes == ROW_BYTES * (1 + max(row for _, row in taken))


def test_sets_of_tables_take_turns_and_neighbours_stay_together() -> None:
    generator = np.random.default_rng(6)
    space = TableSpace(16, n_shared_rows=800)
    sets = []
    for heights in ((256, 256), (256, 16), (512, 512), (512, 64), ()):
        space.begin_set(max(heights, default=0))
        tables = [generator.random((n, 4)).astype(np.float16) for n in heights]
        offsets = [space.place(table) for table in tables]
        assert [space.place(table) for table in tables] == offsets
        space.end_set()
        sets.append(space.sets[-1])
    assert [one.base for one in sets] == [0, 256, 0, 0, 512]
    pairs = [(i, j) for i in range(5) for j in range(i) if sets[i].overlaps(sets[j])]
    assert pairs == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    assert all(a.overlaps(b) == b.overlaps(a) for a in sets for b in sets)
    assert space.n_bytes == 512 * ROW_BYTES
    # What a block copies: a set's compact rows, each to its place.
    places = space.row_places()
    assert places.size == sum(one.n_rows for one in sets) + space.n_rows % 2
    second = places[sets[1].first_row :][: sets[1].n_rows].astype(np.int64)
    assert (second // ROW_BYTES).tolist() == [*range(256, 512), *range(256, 272)]
    assert (second % ROW_BYTES).tolist() == [0] * 256 + [128] * 16


def test_a_table_of_an_earlier_set_is_not_taken_to_be_there() -> None:
    table = np.ones((256, 4), np.float16)
    space = TableSpace(16, n_shared_rows=600)
    offsets = []
    for _ in range(2):
        space.begin_set(256)
        offsets.append(space.place(table))
        space.end_set()
    assert offsets == [0, 256 * ROW_BYTES]
