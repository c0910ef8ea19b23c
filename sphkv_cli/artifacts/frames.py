"""Frames in HDF5: the group `frames` of codebooks.h5 and of allocation.h5, as FORMAT.md says.

The rotation is its kind and seed and its matrix, which must agree with the recorded digest.
Version 1 has one centring for all layers, none or post_rope, and no balancing.
"""

import json
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from sphkv_cli.artifacts.reader import write_array
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation

_MEAN_AXES = "n_layers, n_kv_heads, head_dim"


def write_frames(parent: h5py.Group, frames: FrameSet) -> None:
    """Store frames as the group `frames`.

    Raises:
        ValueError: a balancing that float16 does not hold exactly.
    """
    group = parent.create_group("frames")
    rotation = frames.rotation
    group.attrs["rotation"] = json.dumps(
        {"kind": rotation.kind, "head_dim": rotation.head_dim, "seed": rotation.seed},
        sort_keys=True,
    )
    group.attrs["rotation_digest"] = rotation.digest
    is_one = isinstance(frames.centring, str)
    group.attrs["centring"] = frames.centring if is_one else json.dumps(list(frames.centring))
    write_array(group, "rotation_matrix", rotation.matrix(), "head_dim, head_dim")
    if rotation.kind == "hadamard":
        write_array(group, "rotation_signs", rotation.signs.astype("i1"), "head_dim")
    if frames.key_mean is not None:
        write_array(group, "key_mean", frames.key_mean, _MEAN_AXES)
    if frames.residual_mean is not None:
        write_array(group, "residual_mean", frames.residual_mean, _MEAN_AXES)
    if frames.inv_freq is not None:
        write_array(group, "inv_freq", frames.inv_freq, "n_layers, n_pairs")
    if frames.balancing is not None:
        stored = frames.balancing.astype(np.float16)
        if (stored.astype(np.float64) != frames.balancing).any():
            raise ValueError("a balancing matrix is stored in float16 and must be exact in it")
        write_array(group, "balancing", stored, "n_layers, n_kv_heads, head_dim, head_dim")


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
    centring = str(group.attrs["centring"])
    return FrameSet(
        rotation,
        tuple(json.loads(centring)) if centring.startswith("[") else centring,  # type: ignore[arg-type]
        _array(group, "key_mean"),
        _array(group, "balancing"),
        _array(group, "inv_freq"),
        _array(group, "residual_mean"),
    )


def _array(group: h5py.Group, name: str) -> npt.NDArray[Any] | None:
    return group[name][()] if name in group else None
