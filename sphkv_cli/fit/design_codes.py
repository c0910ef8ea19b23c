"""Which codes are worth measuring at a rate: the leaders of the analytic search.

Of the whole family the best of each kind that a user may have a reason to want: any number of
cells, whole bits per angle, the norm as a float16, a shallower code, what the CUDA kernel reads.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sphkv_cli.errors import UsageError
from sphkv_cli.fit.code_spec import GAINS, default_name
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.search import CodeDesign, SearchSpace, best_codes
from sphkv_codebooks.spherical_code import Gain, SphericalCode
from sphkv_kernels.block_words import NATIVE_HEAD_DIMS
from sphkv_kernels.layout import NATIVE_LAYOUTS
from sphkv_kernels.token_stream import angle_bits

_MINIFLOAT_SPEC = "minifloat:5,6"  # the only minifloat that LAYOUT.md has


Leaders = Mapping[float, Sequence[CodeDesign]]
"""By rate, the analytically best first."""


@dataclass(frozen=True)
class GainPair:
    """The gain of the key code and of the value code."""

    keys: Gain = "none"
    values: Gain = "none"


def build_code(design: CodeDesign, gain: Gain) -> SphericalCode:
    """The code of a design under its usual name."""
    name = default_name(design.n_cells, design.radius, "adjacent", gain)
    return design.build(name, gain=gain)


def allowed_gains(design: CodeDesign) -> tuple[Gain, ...]:
    """The gains that this code can have: an unbiased one needs 3 cells or more on level 1."""
    return tuple(gain for gain in GAINS if gain != "unbiased" or design.n_cells[0] >= 3)


def native_designs(head_dim: int, rate: float = math.inf) -> list[CodeDesign]:
    """The codes that the CUDA kernel reads, of a code rate of at most `rate`, best first."""
    if head_dim not in NATIVE_HEAD_DIMS:
        return []
    found = []
    for layout in NATIVE_LAYOUTS:
        radius = {
            "fp16": "fp16",
            "minifloat": _MINIFLOAT_SPEC,
            "lloyd_max": f"lloyd_max:{layout.radius_bits}",
        }[layout.radius]
        code = SphericalCode.analytic("native", head_dim, layout.level_bits, radius)
        if code.code_rate <= rate + 1e-9:
            found.append(
                CodeDesign(head_dim, code.n_cells, radius, code.code_rate, code.distortion())
            )
    return sorted(found, key=lambda design: design.distortion)


def leading_designs(head_dim: int, rate: float, *, native_only: bool) -> list[CodeDesign]:
    """The leaders at a rate, the analytically best first; each design once.

    Raises:
        CodeError: no code is so small.
    """
    native = native_designs(head_dim, rate)
    found = native[:4] if native_only else _searched(head_dim, rate) + native[:1]
    if not found:
        kind = "that the CUDA kernel reads " if native_only else ""
        raise CodeError(f"no code {kind}of head_dim {head_dim} has {rate:g} bits or less")
    return list(dict.fromkeys(found))


def rows_fit(head_dim: int, rate: float) -> Callable[[CodeDesign], bool]:
    """Whether a token's row, packed, takes no more bytes than `rate` bits a coordinate fill.

    Words of mixed radix and whole bytes cost a few bits; a code that just misses a byte would be
    laid out at a higher rate than the one that was asked for.
    """
    n_bytes = math.ceil(rate * head_dim / 8.0 - 1e-9)

    def fits(design: CodeDesign) -> bool:
        angles = angle_bits(head_dim, design.n_cells)
        overhead = design.overhead_bits
        return angles + overhead <= 8 * n_bytes

    return fits


def leaders_of(head_dim: int, rates: Sequence[float], *, native_only: bool) -> Leaders:
    """The leaders at every rate.

    Raises:
        UsageError: a rate below every code.
    """
    try:
        return {rate: leading_designs(head_dim, rate, native_only=native_only) for rate in rates}
    except CodeError as error:
        raise UsageError(str(error), "ask for a larger --target-rate") from error


def _searched(head_dim: int, rate: float) -> list[CodeDesign]:
    fits = rows_fit(head_dim, rate)
    best = best_codes(SearchSpace(head_dim), rate, fits=fits)
    if not best:
        return []
    deepest = head_dim.bit_length() - 1
    found = best[:2]
    found += best_codes(SearchSpace(head_dim, cells="powers_of_two"), rate, 1, fits)
    found += best_codes(SearchSpace(head_dim, full_depth_radii=("norm",)), rate, 1, fits)
    if deepest > 1:
        shallower = SearchSpace(head_dim, depths=tuple(range(1, min(deepest, 5))))
        found += best_codes(shallower, rate, 1, fits)
    return found


def split_rates(
    rate: float, key_slope: float, value_slope: float, head_dim: int
) -> list[tuple[float, float]]:
    """Rates of keys and values that average to `rate` and are worth trying, in whole bytes.

    With errors key_slope 4^-R_k + value_slope 4^-R_v the sum is least at R_k - R_v =
    log4(key_slope / value_slope); half of that difference is tried as well.
    """
    if min(key_slope, value_slope) <= 0:
        return []
    best = 0.5 * math.log(key_slope / value_slope, 4.0)
    best = max(-0.75, min(0.75, best))
    byte = 8.0 / head_dim
    steps = dict.fromkeys(byte * round(step / byte) for step in (best, best / 2))
    return [(rate + step, rate - step) for step in steps if step]
