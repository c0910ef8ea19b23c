"""Published methods by the names that options have, as codings of a whole cache.

TurboQuant and EDEN carry their own Haar rotation, as published; ",centred" centres keys first as
the frames of the codebooks do, which is not in their papers but is what our codes get too.
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
METHOD_NAMES = _UNROTATED + _ROTATED


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
        if name not in _ROTATED:
            raise ValueError(f"no published method {name!r}")
        method, _, rest = name.partition(":")
        bits, _, centred = rest.partition(",")
        if centred and centring is None:
            raise ValueError(f"{name} needs frames that centre keys")
        for seed in seeds:
            rotation = Rotation("haar", shape.head_dim, seed)
            quantizer: VectorQuantizer = (
                TurboQuantMse(int(bits), shape.head_dim, rotation)
                if method == "turboquant"
                else Eden(int(bits), shape.head_dim, "unbiased", rotation)
            )
            label = f"{quantizer.name}, Haar{', centred' if centred else ''}"
            if len(seeds) > 1:
                label += f", seed {seed}"
            yield ComparatorCoding(
                label, quantizer, quantizer, shape, centring if centred else None
            )


def _unrotated(name: str) -> tuple[VectorQuantizer, VectorQuantizer]:
    method, _, bits = name.partition(":")
    if method == "kivi":
        return KiviKeys(int(bits)), KiviValues(int(bits))
    if method.startswith("fp8"):
        return Float8(name.endswith("scaled")), Float8(name.endswith("scaled"))
    return IntegerPerToken(int(name[3:])), IntegerPerToken(int(name[3:]))
