"""Frames in HDF5: the group `frames` of codebooks.h5 and of allocation.h5, as FORMAT.md says.

The rotation is its kind and seed and its matrix, which must agree with the recorded digest.
"""

import json
from typing import Any

import h5py
import numpy.typing as npt

from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation


def write_frames(parent: h5py.Group, frames: FrameSet) -> None:
    """Store frames as the group `frames`.

    Raises:
        ValueError: the frames are balanced, for which version 1 has no place.
    """
    if frames.balancing is not None:
        raise ValueError("version 1 of the format keeps no balancing")
    group = parent.create_group("frames")
    rotation = frames.rotation
    group.attrs["rotation"] = json.dumps(
        {"kind": rotation.kind, "head_dim": rotation.head_dim, "seed": rotation.seed},
        sort_keys=True,
    )
    group.attrs["rotation_digest"] = rotation.digest
    group.attrs["centring"] = frames.centring
    _create(group, "rotation_matrix", rotation.matrix(), "head_dim, head_dim")
    if rotation.kind == "hadamard":
        _create(group, "rotation_signs", rotation.signs.astype("i1"), "head_dim")
    if frames.key_mean is not None:
        _create(group, "key_mean", frames.key_mean, "n_layers, n_kv_heads, head_dim")


def read_frames(parent: h5py.Group, head_dim: int) -> FrameSet:
    """The inverse of `write_frames`.

    Raises:
        KeyError, ValueError: something is missing, of another shape, or contradicts its digest.
    """
    group = parent["frames"]
    described = json.loads(group.attrs["rotation"])
    matrix = group["rotation_matrix"][()]
    if matrix.shape != (head_dim, head_dim):
        raise ValueError(f"the rotation has shape {matrix.shape}, head_dim is {head_dim}")
    rotation = Rotation(
        described["kind"], int(described["head_dim"]), int(described["seed"]), matrix
    )
    recorded = str(group.attrs["rotation_digest"])
    if rotation.digest != recorded:
        raise ValueError(
            f"the rotation matrix has digest {rotation.digest[:12]}, recorded is {recorded[:12]}"
        )
    if rotation.kind == "hadamard" and (group["rotation_signs"][()] != rotation.signs).any():
        raise ValueError("the signs of the rotation contradict its matrix")
    key_mean = group["key_mean"][()] if "key_mean" in group else None
    return FrameSet(rotation, str(group.attrs["centring"]), key_mean)  # type: ignore[arg-type]


def _create(group: h5py.Group, name: str, values: npt.NDArray[Any], axes: str) -> None:
    group.create_dataset(name, data=values).attrs["axes"] = axes
