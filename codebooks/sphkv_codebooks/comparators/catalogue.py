"""Every published method at its published settings, as pairs of a key code and a value code.

    rate of a pair = (rate of keys + rate of values) / 2,  16 bits for a side that stays dense

Source: ours; each method names its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sphkv_codebooks.comparators.eden import GAINS, Eden
from sphkv_codebooks.comparators.float8 import Float8
from sphkv_codebooks.comparators.integer import IntegerPerToken
from sphkv_codebooks.comparators.interface import Comparator, OrthogonalMap, VectorQuantizer
from sphkv_codebooks.comparators.kivi import KiviKeys, KiviValues
from sphkv_codebooks.comparators.polarquant import PolarQuant
from sphkv_codebooks.comparators.qjl import Qjl
from sphkv_codebooks.comparators.spherical_kmeans import SPHERICAL_KV_TIERS, fit_spherical_kmeans
from sphkv_codebooks.comparators.token_groups import DENSE_BITS
from sphkv_codebooks.comparators.turboquant_mse import TurboQuantMse
from sphkv_codebooks.comparators.turboquant_prod import TurboQuantProd
from sphkv_codebooks.comparators.wu_polar import WuPolarQuant
from sphkv_codebooks.errors import CodeError


@dataclass(frozen=True)
class MethodPair:
    """One method as a whole cache would use it. values None: values stay dense, 16 bits."""

    name: str
    keys: Comparator
    values: VectorQuantizer | None

    def __post_init__(self) -> None:
        if "keys" not in self.keys.roles:
            raise CodeError(f"{self.keys.name} was not made for keys")
        if self.values is not None and "values" not in self.values.roles:
            raise CodeError(f"{self.values.name} was not made for values")

    def rate(self, head_dim: int, n_tokens: int) -> float:
        """Bits per coordinate, mean of keys and values, all stored per token included."""
        of_values = float(DENSE_BITS)
        if self.values is not None:
            of_values = self.values.rate(head_dim, n_tokens)
        return 0.5 * (self.keys.rate(head_dim, n_tokens) + of_values)


def published_methods(
    head_dim: int,
    rotation: OrthogonalMap | None,
    generator: np.random.Generator,
    bits: Sequence[int] = (1, 2, 3, 4, 5),
) -> tuple[MethodPair, ...]:
    """All methods that need no calibration data.

    rotation: for the rotated ones; None when the caller's vectors already lie in a rotated frame
    (then KIVI, the integers, fp8 and Wu et al. see rotated vectors too, which is not how they were
    published: pass raw vectors and a rotation for a comparison as published).
    generator: draws the QJL projections. bits: for TurboQuant and EDEN.
    """
    # A child stream: Rotation draws from the parent's, and the two must be independent.
    generator = generator.spawn(1)[0]
    methods: list[MethodPair] = []

    def add(method: VectorQuantizer) -> None:
        values = method if "values" in method.roles else None
        methods.append(MethodPair(method.name, method, values))

    for b in bits:
        add(TurboQuantMse(b, head_dim, rotation))
    for b in bits:
        prod = TurboQuantProd.sample(b, head_dim, generator, rotation)
        methods.append(MethodPair(prod.name, prod, None))
    for factor in (1, 2, 4):
        qjl = Qjl.sample(head_dim, factor * head_dim, generator)
        methods.append(MethodPair(qjl.name, qjl, None))
    for b in bits:
        for gain in GAINS:
            add(Eden(b, head_dim, gain, rotation))
    methods += [MethodPair(f"KIVI-{b}", KiviKeys(b), KiviValues(b)) for b in (2, 4)]
    for b in (4, 8):
        add(IntegerPerToken(b))
    for has_scale in (False, True):
        add(Float8(has_scale))
    if head_dim >= 16:
        add(PolarQuant(head_dim, rotation))
    for b in (3, 4):
        add(WuPolarQuant(b, b))
    return tuple(methods)


def calibrated_methods(
    calibration_keys: torch.Tensor, generator: torch.Generator
) -> tuple[MethodPair, ...]:
    """The tiers of the Spherical KV authors' public code, for one (layer, KV head).

    calibration_keys: (n_tokens, head_dim). Tiers whose group does not divide head_dim are refused.
    """
    fitted = (
        fit_spherical_kmeans(calibration_keys, group_size, n_directions, generator)
        for group_size, n_directions in SPHERICAL_KV_TIERS
    )
    return tuple(MethodPair(method.name, method, None) for method in fitted)
