"""A spherical code as JSON, and back: every float64 survives the trip, so every bit of a code does.

{"description_version", "name", "head_dim", "depth", "pairing", "gain",
 "radius": {"spec", and for lloyd_max "centroids", "thresholds" of rho},
 "levels": [{"level", "n_cells", "centroids_rad", "thresholds_rad"}, ...]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sphkv_codebooks.codebook import Codebook
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.radius import LloydMaxRadius, RadiusCoding, radius_coding_from_spec

if TYPE_CHECKING:
    from sphkv_codebooks.spherical_code import SphericalCode

DESCRIPTION_VERSION = 1


def describe_code(code: SphericalCode) -> dict[str, Any]:
    """The description of `code`, ready for json.dumps."""
    radius: dict[str, Any] = {"spec": code.radius_coding.spec}
    if isinstance(code.radius_coding, LloydMaxRadius):
        radius["centroids"] = code.radius_coding.centroids.tolist()
        radius["thresholds"] = code.radius_coding.thresholds.tolist()
    return {
        "description_version": DESCRIPTION_VERSION,
        "name": code.name,
        "head_dim": code.head_dim,
        "depth": code.depth,
        "pairing": code.pairing,
        "gain": code.gain,
        "radius": radius,
        "levels": [
            {
                "level": book.level,
                "n_cells": book.n_cells,
                "centroids_rad": book.centroids.tolist(),
                "thresholds_rad": book.thresholds.tolist(),
            }
            for book in code.codebooks
        ],
    }


def described_fields(description: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments of the described SphericalCode; refuses what it cannot read."""
    try:
        version = int(description["description_version"])
        if version > DESCRIPTION_VERSION:
            raise CodeError(
                f"code description version {version} is newer than {DESCRIPTION_VERSION}, "
                "the newest this sphkv reads: update sphkv"
            )
        head_dim, depth = int(description["head_dim"]), int(description["depth"])
        levels = description["levels"]
        return {
            "name": str(description["name"]),
            "head_dim": head_dim,
            "depth": depth,
            "n_cells": tuple(int(level["n_cells"]) for level in levels),
            "pairing": description["pairing"],
            "radius_coding": _radius_coding(description["radius"], head_dim, depth),
            "gain": description["gain"],
            "codebooks": tuple(_codebook(level) for level in levels),
        }
    except CodeError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CodeError(
            f"not a spherical code description ({type(error).__name__}: {error})"
        ) from error


def _codebook(level: Mapping[str, Any]) -> Codebook:
    number = int(level["level"])
    return Codebook(
        number,
        np.asarray(level["centroids_rad"], dtype=np.float64),
        np.asarray(level["thresholds_rad"], dtype=np.float64),
        is_circle=number == 1,
    )


def _radius_coding(radius: Mapping[str, Any], head_dim: int, depth: int) -> RadiusCoding:
    spec = str(radius["spec"])
    if "centroids" not in radius:
        return radius_coding_from_spec(spec, 1 << depth, head_dim)
    return LloydMaxRadius(
        int(spec.removeprefix("lloyd_max:")),
        np.asarray(radius["centroids"], dtype=np.float64),
        np.asarray(radius["thresholds"], dtype=np.float64),
    )
