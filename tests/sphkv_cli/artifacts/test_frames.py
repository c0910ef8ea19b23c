"""Frames come back from a file as they went in, bit for bit, whatever they hold."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from sphkv_cli.artifacts.frames import read_frames, write_frames
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation

N_LAYERS, N_KV_HEADS, HEAD_DIM = 3, 2, 8


def mixed() -> FrameSet:
    """One layer of each centring, with everything that frames can have."""
    rng = np.random.default_rng(0)
    shape = (N_LAYERS, N_KV_HEADS, HEAD_DIM)
    mean, residual = rng.standard_normal((2, *shape)).astype(np.float32)
    mean[0], residual[[0, 1]] = 0, 0
    balancing = np.eye(HEAD_DIM) * rng.uniform(0.5, 2, (*shape, 1)).astype(np.float16)
    return FrameSet(
        Rotation("hadamard", HEAD_DIM, 3),
        ("none", "post_rope", "pre_rope"),
        mean,
        balancing,
        np.tile(np.geomspace(1, 1e-3, HEAD_DIM // 2), (N_LAYERS, 1)).astype(np.float32),
        residual,
    )


@pytest.mark.parametrize(
    "frames",
    [mixed(), replace(mixed(), balancing=None), FrameSet(Rotation("haar", HEAD_DIM, 1))],
    ids=["everything", "no balancing", "bare"],
)
def test_frames_are_read_as_they_were_written(tmp_path: Path, frames: FrameSet) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as file:
        write_frames(file, frames)
    with h5py.File(tmp_path / "f.h5") as file:
        back = read_frames(file, HEAD_DIM)
        assert all("axes" in dataset.attrs for dataset in file["frames"].values())
    assert back.rotation.digest == frames.rotation.digest
    assert back.centring == frames.centring
    for name in ("key_mean", "balancing", "inv_freq", "residual_mean"):
        written, found = getattr(frames, name), getattr(back, name)
        assert (written is None) == (found is None)
        if written is not None:
            assert written.dtype == found.dtype and (written == found).all()


def test_a_balancing_that_float16_would_change_is_not_written(tmp_path: Path) -> None:
    balancing = np.broadcast_to(np.eye(HEAD_DIM) * 1.0001, (1, 1, HEAD_DIM, HEAD_DIM))
    frames = FrameSet(Rotation("haar", HEAD_DIM, 1), balancing=balancing)
    with h5py.File(tmp_path / "f.h5", "w") as file, pytest.raises(ValueError, match="float16"):
        write_frames(file, frames)


@pytest.mark.parametrize(
    ("centring", "says"),
    [
        ('["none", "post_rope"]', "2 centrings and key means of 3 layers"),
        ('["post_rope", "post_rope", "sideways"]', "centring must be one of"),
        ('["none", "post_rope", "post_rope"]', "residual_mean must be 0"),
    ],
)
def test_a_damaged_centring_is_refused(tmp_path: Path, centring: str, says: str) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as file:
        write_frames(file, mixed())
        file["frames"].attrs["centring"] = centring
        with pytest.raises(CodeError, match=says):
            read_frames(file, HEAD_DIM)
