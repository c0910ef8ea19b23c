"""The candidate codes and tiers of a fit, in the order in which they are stored.

A tier is a pair (key code, value code). Without a choice every code is paired with itself, and of
the default codes only those that the CUDA kernel reads become tiers: a plan must run where it is
proved. Keys need about a bit more than values at equal damage, so pairs with a finer key code are
worth trying.
"""

from sphkv_cli.errors import UsageError
from sphkv_cli.fit.code_spec import CodeSpec, default_code_texts, parse_code_specs
from sphkv_cli.fit.options import FitOptions
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.block_words import decoded_layout_of
from sphkv_kernels.pages import region_bytes
from sphkv_kernels.tier import TierFormat


def laid_out_rate(code: SphericalCode, page_size: int) -> float:
    """Bits per coordinate of a full region of a page, padding included."""
    n_bits = 8 * region_bytes(code, code.head_dim, page_size)
    return n_bits / (page_size * code.head_dim)


def candidate_codes(options: FitOptions, head_dim: int) -> tuple[SphericalCode, ...]:
    """The codes, by laid-out rate on the first page size, then by predicted distortion.

    Raises:
        UsageError: a specification that cannot be meant for this head_dim.
    """
    texts = options.codes or default_code_texts(head_dim)
    codes = [_build(spec, head_dim) for spec in parse_code_specs(texts, head_dim)]
    page_size = options.page_sizes[0]
    return tuple(sorted(codes, key=lambda c: (laid_out_rate(c, page_size), c.distortion())))


def candidate_tiers(
    options: FitOptions, codes: tuple[SphericalCode, ...]
) -> tuple[TierFormat, ...]:
    """The tiers, by laid-out rate of key and value together.

    Raises:
        UsageError: a tier of a code that is not among `codes`, or named twice.
    """
    by_name = {code.name: code for code in codes}
    texts = options.tiers or _default_tiers(options, codes)
    pairs = [_pair(text, by_name) for text in texts]
    if len(set(pairs)) < len(pairs):
        raise UsageError(f"a tier is named twice in {', '.join(options.tiers)}", "name each once")
    page_size, order = options.page_sizes[0], list(by_name)

    def place(pair: tuple[str, str]) -> tuple[float, int, int]:
        rate = sum(laid_out_rate(by_name[name], page_size) for name in pair)
        return rate, order.index(pair[0]), order.index(pair[1])

    return tuple(
        TierFormat.spherical(by_name[key], by_name[value])
        for key, value in sorted(pairs, key=place)
    )


def _default_tiers(options: FitOptions, codes: tuple[SphericalCode, ...]) -> tuple[str, ...]:
    names = tuple(code.name for code in codes)
    if options.codes:
        return names
    native = tuple(code.name for code in codes if decoded_layout_of(code) is not None)
    # Of the small head dimensions that the kernel does not read, every code serves the reference.
    return native or names


def _build(spec: CodeSpec, head_dim: int) -> SphericalCode:
    try:
        return SphericalCode.analytic(
            spec.name,
            head_dim,
            radius=spec.radius,
            n_cells=spec.n_cells,
            pairing=spec.pairing,
            gain=spec.gain,
        )
    except CodeError as error:
        raise UsageError(str(error), "choose another --code") from error


def _pair(text: str, by_name: dict[str, SphericalCode]) -> tuple[str, str]:
    key, has_value, value = text.partition("/")
    pair = (key, value if has_value else key)
    for name in pair:
        if name not in by_name:
            raise UsageError(
                f"the tier {text!r} has the code {name!r}, which is not a candidate",
                f"write KEY_CODE/VALUE_CODE with names among {', '.join(by_name)}",
            )
    return pair
