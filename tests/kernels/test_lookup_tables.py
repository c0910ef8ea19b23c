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
