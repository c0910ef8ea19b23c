"""Who takes part: every family as a ladder of settings, centred and not, once per seed.

A family's settings differ in rate alone, so that a value between two of them may be interpolated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sphkv_cli.comparison.options import CompareOptions
from sphkv_cli.comparison.polar_quantizer import PolarQuantizer, packed_rate, polar_code_at
from sphkv_codebooks.comparators.eden import Eden
from sphkv_codebooks.comparators.float8 import Float8
from sphkv_codebooks.comparators.integer import IntegerPerToken
from sphkv_codebooks.comparators.interface import FP16_BITS, Comparator, VectorQuantizer
from sphkv_codebooks.comparators.kivi import KiviKeys, KiviValues
from sphkv_codebooks.comparators.qjl import Qjl
from sphkv_codebooks.comparators.spherical_kmeans import SPHERICAL_KV_TIERS, fit_spherical_kmeans
from sphkv_codebooks.comparators.turboquant_mse import TurboQuantMse
from sphkv_codebooks.comparators.turboquant_prod import TurboQuantProd
from sphkv_codebooks.comparators.wu_polar import WuPolarQuant
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode

POLAR = "polar"
LEAST_D = "polar, least D"
PAPER = "polar, the paper's 4/2/2/2 fp16"
KMEANS_SETTINGS = (*SPHERICAL_KV_TIERS[::-1], (8, 256), (4, 256))
"""The authors' three tiers, then two of ours: groups of 8 and 4 take their idea past 2 bits."""

KEYS_PER_DIRECTION = 4
"""Fewer calibration keys than this per direction would be learnt by heart."""

_GROUP_ALIGNMENT = 128
"""A common multiple of all groups of tokens: rates are stated for whole groups."""


@dataclass(frozen=True)
class KmeansSetting:
    """Spherical k-means, fitted per (layer, KV head) on `fit` documents."""

    group_size: int
    n_directions: int

    def fit(self, keys: Tensor, seed: int) -> Comparator:
        """keys: (n_tokens, head_dim)."""
        generator = torch.Generator().manual_seed(seed)
        return fit_spherical_kmeans(keys, self.group_size, self.n_directions, generator)


@dataclass(frozen=True, eq=False)
class Candidate:
    """One setting of one family under one seed.

    values: None leaves values dense; is_centred: keys are coded relative to the frame's c_t.
    key_rate, value_rate: bits per coordinate over whole groups of tokens.
    """

    family: str
    setting: str
    keys: Comparator | KmeansSetting
    values: VectorQuantizer | None
    key_rate: float
    is_centred: bool
    seed: int

    @property
    def row(self) -> tuple[str, str, bool]:
        """Seeds of one row share it."""
        return self.family, self.setting, self.is_centred


def candidates_of(
    options: CompareOptions,
    head_dim: int,
    own_codes: Sequence[SphericalCode],
    n_fit_tokens: int,
) -> tuple[Candidate, ...]:
    """Everybody; `own_codes`: codes of the user's codebooks, each its own family.

    K-means takes part with as many directions as `n_fit_tokens` keys can teach.

    Polar codes are designed for the asked rates and for every rival's own rate up to 6 bits; at
    the asked rates also those of least D.  Rotated methods of one seed share their Haar rotation.
    """
    rivals = [
        candidate
        for seed in range(options.seed, options.seed + options.seeds)
        for family in options.families
        for candidate in _family(family, head_dim, options.rates, seed, n_fit_tokens)
        # What no seed enters is taken once.
        if seed == options.seed or is_random(candidate)
    ]
    rates = {*options.rates, *(round(c.key_rate, 9) for c in rivals if c.key_rate <= 6.0)}
    codes = {
        code.digest: (POLAR, code) for r in sorted(rates) if (code := polar_code_at(head_dim, r))
    }
    least = [polar_code_at(head_dim, rate, has_fine_norm=False) for rate in options.rates]
    found = [
        *codes.values(),
        *((LEAST_D, code) for code in least if code is not None),
        *((f"polar, {code.name}", code) for code in own_codes),
    ]
    if head_dim >= 16:
        paper = SphericalCode.analytic("4/2/2/2 fp16", head_dim, (4, 2, 2, 2), "fp16")
        found.append((PAPER, paper))
    polar = [
        _polar(family, code, seed)
        for seed in range(options.seed, options.seed + options.seeds)
        for family, code in found
    ]
    return tuple(
        Candidate(c.family, c.setting, c.keys, c.values, c.key_rate, is_centred, c.seed)
        for c in (*polar, *rivals)
        for is_centred in (False, True)
    )


def is_random(candidate: Candidate) -> bool:
    """Whether another seed gives another quantiser."""
    return isinstance(candidate.keys, PolarQuantizer | TurboQuantMse | TurboQuantProd | Qjl | Eden)


def _polar(family: str, code: SphericalCode, seed: int) -> Candidate:
    quantizer = PolarQuantizer(code, Rotation("haar", code.head_dim, seed))
    return Candidate(family, code.name, quantizer, quantizer, packed_rate(code), False, seed)


def _family(
    family: str, head_dim: int, rates: Sequence[float], seed: int, n_fit_tokens: int
) -> Iterator[Candidate]:
    def made(
        name: str, keys: Comparator, values: VectorQuantizer | None, setting: str = ""
    ) -> Candidate:
        rate = keys.rate(head_dim, _GROUP_ALIGNMENT)
        return Candidate(name, setting or keys.name, keys, values, rate, False, seed)

    rotation = Rotation("haar", head_dim, seed)
    # A child stream: the rotation draws from its own, and the two must be independent.
    generator = np.random.default_rng(seed).spawn(1)[0]
    if family == "turboquant-mse":
        for bits in (1, 2, 3, 4, 5):
            turbo = TurboQuantMse(bits, head_dim, rotation)
            yield made("TurboQuant-MSE", turbo, turbo)
    elif family == "turboquant-prod":
        for bits in (2, 3, 4, 5):
            prod = TurboQuantProd.sample(bits, head_dim, generator, rotation)
            yield made("TurboQuant-prod", prod, None)
    elif family == "qjl":
        for rate in rates:
            n_signs = max(int(rate * head_dim) - FP16_BITS, 1)
            yield made("QJL", Qjl.sample(head_dim, n_signs, generator), None)
    elif family == "eden":
        for gain in ("unbiased", "least_squares"):
            for bits in (1, 2, 3, 4, 5):
                eden = Eden(bits, head_dim, gain, rotation)
                yield made(f"DRIVE/EDEN {gain.replace('_', ' ')}", eden, eden)
    elif family == "kivi":
        group = min(32, head_dim)
        for bits in (1, 2, 3, 4, 5):
            keys, values = KiviKeys(bits), KiviValues(bits, group)
            yield made("KIVI", keys, values, f"KIVI-{bits}")
    elif family == "kmeans":
        for group_size, n_directions in KMEANS_SETTINGS:
            has_keys = n_fit_tokens >= KEYS_PER_DIRECTION * n_directions
            if head_dim % group_size == 0 and has_keys:
                yield _kmeans(group_size, n_directions, head_dim, seed)
    elif family == "wu":
        for bits in (2, 3, 4, 5):
            yield made("PolarQuant (Wu et al.)", WuPolarQuant(bits, bits), None)
    elif family == "integer":
        for bits in (2, 3, 4, 5, 8):
            yield made("int per token", IntegerPerToken(bits), IntegerPerToken(bits))
    else:
        yield made("fp8 e4m3", Float8(False), Float8(False))
        yield made("fp8 e4m3, scaled", Float8(True), Float8(True))


def _kmeans(group_size: int, n_directions: int, head_dim: int, seed: int) -> Candidate:
    # The rate does not depend on the directions: any unit ones will do to ask for it.
    any_keys = torch.randn(n_directions + 1, head_dim, generator=torch.Generator().manual_seed(0))
    method = fit_spherical_kmeans(
        any_keys, group_size, n_directions, torch.Generator().manual_seed(0), n_rounds=1
    )
    rate = method.rate(head_dim, _GROUP_ALIGNMENT)
    setting = KmeansSetting(group_size, n_directions)
    return Candidate("spherical k-means", method.name, setting, None, rate, False, seed)
