"""Published methods by the names that options have, as codings of a whole cache.

PolarQuant (4/2/2/2, fp16 radii), TurboQuant and EDEN carry their own Haar rotation, as published;
",centred" centres keys first as the frames of the codebooks do, which is not in their papers but is
what our codes get too.  All are charged with what their papers store for a token, without pages.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from sphkv_cli.evaluation.coding import KeyValueCoding, ModelCacheShape
from sphkv_cli.evaluation.comparator_coding import ComparatorCoding
from sphkv_codebooks.comparators.eden import Eden
from sphkv_codebooks.comparators.float8 import Float8
from sphkv_codebooks.comparators.integer import IntegerPerToken
from sphkv_codebooks.comparators.interface import VectorQuantizer
from sphkv_codebooks.comparators.kivi import KiviKeys, KiviValues
from sphkv_codebooks.comparators.polarquant import PolarQuant
from sphkv_codebooks.comparators.turboquant_mse import TurboQuantMse
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation

_UNROTATED = ("kivi:2", "kivi:4", "fp8", "fp8-scaled", "int8", "int4")
_ROTATED = tuple(
    f"{method}:{bits}{centred}"
    for method in ("turboquant", "eden")
    for bits in (2, 3, 4)
    for centred in ("", ",centred")
)
_POLAR = ("polarquant", "polarquant,centred")
METHOD_NAMES = _UNROTATED + _POLAR + _ROTATED
_FAMILIES = {
    "kivi": "KIVI",
    "fp8": "fp8",
    "fp8-scaled": "fp8, scaled",
    "int8": "integers per token",
    "int4": "integers per token",
    "polarquant": "PolarQuant",
    "turboquant": "TurboQuant-MSE",
    "eden": "EDEN unbiased",
}


def default_methods(*, is_centred: bool) -> tuple[str, ...]:
    """What is compared with when nobody asks for anything else."""
    polar = _POLAR if is_centred else _POLAR[:1]
    return ("turboquant:3", "turboquant:4", *polar, "kivi:2", "kivi:4", "fp8", "int8")


def family_of(name: str) -> str:
    """What a method is called at any rate."""
    method, _, centred = name.partition(",")
    return _FAMILIES[method.partition(":")[0]] + (", centred" if centred else "")


def published_codings(
    names: Sequence[str], shape: ModelCacheShape, frames: FrameSet | None, seeds: Sequence[int]
) -> Iterator[KeyValueCoding]:
    """Codings of the methods called `names`; rotated ones once per seed.

    Args:
        frames: whose centring ",centred" takes; None, or frames without any, refuse those.

    Raises:
        ValueError: a name that is not one of METHOD_NAMES, or a centring that is missing.
    """
    centring = None
    if frames is not None and frames.key_mean is not None:
        centring = replace(frames, rotation=Rotation("none", shape.head_dim), balancing=None)
    for name in names:
        if name in _UNROTATED:
            keys, values = _unrotated(name)
            yield ComparatorCoding(keys.name.removesuffix(" keys"), keys, values, shape)
            continue
        if name not in _POLAR + _ROTATED:
            raise ValueError(f"no published method {name!r}")
        method, _, centred = name.partition(",")
        method, _, bits = method.partition(":")
        if centred and centring is None:
            raise ValueError(f"{name} needs frames that centre keys")
        for seed in seeds:
            rotation = Rotation("haar", shape.head_dim, seed)
            label = f", Haar{', centred' if centred else ''}"
            label += f", seed {seed}" if len(seeds) > 1 else ""
            quantizer = _rotated(method, bits, shape.head_dim, rotation)
            yield ComparatorCoding(
                quantizer.name + label, quantizer, quantizer, shape, centring if centred else None
            )


def _rotated(method: str, bits: str, head_dim: int, rotation: Rotation) -> VectorQuantizer:
    if method == "polarquant":
        return PolarQuant(head_dim, rotation)
    if method == "turboquant":
        return TurboQuantMse(int(bits), head_dim, rotation)
    return Eden(int(bits), head_dim, "unbiased", rotation)


def _unrotated(name: str) -> tuple[VectorQuantizer, VectorQuantizer]:
    method, _, bits = name.partition(":")
    if method == "kivi":
        return KiviKeys(int(bits)), KiviValues(int(bits))
    if method.startswith("fp8"):
        return Float8(name.endswith("scaled")), Float8(name.endswith("scaled"))
    return IntegerPerToken(int(name[3:])), IntegerPerToken(int(name[3:]))
