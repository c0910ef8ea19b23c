"""A spherical code among the comparators: one rotation, and bytes as its pages hold them.

    xhat = S^T Q(S x),   R = 8 bytes of a full page region / (page_size head_dim)

The rate is that of the packed words, so a code with uneven cells pays for what its words waste;
rivals are charged their papers' bits, which waste nothing.  Source: ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sphkv_codebooks.comparators.interface import (
    Role,
    VectorQuantizer,
    check_sizes,
    check_vectors,
)
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.search import (
    BLOCK_RADII,
    FULL_DEPTH_RADII,
    CodeDesign,
    SearchSpace,
    best_code,
)
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.pages import region_bytes

PAGE_SIZE = 32

FINE_NORMS = ("norm", "minifloat:5,6")
_BLOCK_RADII = tuple(spec for spec in BLOCK_RADII if "minifloat" not in spec)

_WASTE_BITS = (0, 2, 4, 6, 8, 12, 16)
"""Bits per vector that the words of a code with uneven cells may leave unused."""


@dataclass(frozen=True)
class PolarQuantizer(VectorQuantizer):
    """code: in the frame of `rotation`."""

    code: SphericalCode
    rotation: Rotation

    @property
    def name(self) -> str:
        return self.code.name

    @property
    def source(self) -> str:
        return "PolarQuant, arXiv 2502.02617; bits and radii ours"

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({"keys", "values"})

    @property
    def token_group(self) -> int:
        return 1

    @property
    def table_bytes(self) -> int:
        return 0

    def rate(self, head_dim: int, n_tokens: int) -> float:
        check_sizes(head_dim, n_tokens, self.code.head_dim)
        return packed_rate(self.code)

    def reconstruct(self, x: Tensor) -> Tensor:
        check_vectors(x, self.code.head_dim)
        framed = self.rotation.apply(x)
        return self.rotation.apply_inverse(self.code.decode(self.code.encode(framed), x.dtype))


def packed_rate(code: SphericalCode) -> float:
    """Bits per coordinate of a full region of a page, padding included."""
    n_bits = 8 * region_bytes(code, code.head_dim, PAGE_SIZE)
    return n_bits / (PAGE_SIZE * code.head_dim)


def polar_code_at(
    head_dim: int, rate: float, *, has_fine_norm: bool = True
) -> SphericalCode | None:
    """The code of least predicted D whose packed rate is at most `rate`; None where none is.

    has_fine_norm: norms with six mantissa bits or more. D alone would round norms more coarsely,
    but that error lies along the key: it moves the logits of the very keys that a query attends to,
    and the attention output with them.
    """
    norms = FINE_NORMS if has_fine_norm else FULL_DEPTH_RADII
    designs: list[CodeDesign] = []
    for cells, waste in [("powers_of_two", 0), *(("any", bits) for bits in _WASTE_BITS)]:
        space = SearchSpace(
            head_dim,
            cells,  # type: ignore[arg-type]
            block_radii=_BLOCK_RADII if has_fine_norm else BLOCK_RADII,
            full_depth_radii=norms,
        )
        try:
            designs.append(best_code(space, rate - waste / head_dim))
        except CodeError:
            continue
    for design in sorted(designs, key=lambda d: d.distortion):
        code = design.build(design_name(design.n_cells, design.radius))
        if packed_rate(code) <= rate + 1e-9:
            return code
    return None


def design_name(n_cells: Sequence[int], radius: str) -> str:
    """polar n16.4.8 minifloat:5,3: cells per level and radii."""
    return f"polar n{'.'.join(str(n) for n in n_cells)} {radius}"
