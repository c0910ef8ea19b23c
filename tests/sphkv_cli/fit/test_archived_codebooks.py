"""A codebooks.h5 of format version 1, written once and kept: it must load for ever.

Never write it anew: a reader that cannot load it is the defect. head_dim 8, one layer, one KV head,
two codes, one mixed tier, empirical books.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from sphkv_cli.artifacts.codebooks import CodebooksReader
from sphkv_cli.artifacts.store import verify_digest

ARCHIVED = Path(__file__).parent / "archive" / "codebooks-v1.h5"


def test_the_archived_file_is_the_one_that_was_kept() -> None:
    reader = CodebooksReader.open(ARCHIVED)
    assert reader.digest == "565bebdcfd637705d969f4e0f977ae375d19515a9c067bfa790ec5671739a0ef"
    assert verify_digest(ARCHIVED)
    assert reader.header.version == 1


def test_the_archived_codes_load_and_code() -> None:
    reader = CodebooksReader.open(ARCHIVED)
    assert {code.name: code.digest for code in reader.codes} == {
        "small": "001c8c28fc803964cff47575ee2f00d2e28dae51dba9036d04f4482d18bb75dd",
        "polar-422-norm": "d46b108d58f444a36f496fc154bf379a3805644a3e3e63700981a607e748f8f9",
    }
    assert [tier.name for tier in reader.tiers] == ["small", "polar-422-norm/small"]
    # (1, sqrt 3) has the angle pi / 3, in cell 2 of 16 equal arcs from 0.
    x = torch.tensor([[1.0, 3.0**0.5, 3.0, 0.1, -0.1, 3.0, -3.0, 0.5]])
    encoded = reader.code("polar-422-norm").encode(x)
    assert encoded.angle_codes[0].tolist() == [[2, 0, 4, 7]]
    assert encoded.norms is not None
    assert encoded.norms.item() == pytest.approx(x.norm().item(), rel=1e-3)


def test_the_archived_frames_tables_and_books_load() -> None:
    reader = CodebooksReader.open(ARCHIVED)
    rotation = reader.frames.rotation
    assert (rotation.kind, rotation.head_dim, rotation.seed) == ("hadamard", 8, 42)
    assert np.abs(rotation.matrix() @ rotation.matrix().T - np.eye(8)).max() < 1e-12
    assert reader.frames.key_mean is not None
    assert reader.frames.key_mean.shape == (1, 1, 8)
    assert [row.key_distortion for row in reader.tables.codes] == pytest.approx(
        [0.10473001612858339, 0.027831266986939943]
    )
    assert [row.level for row in reader.tables.levels] == [1, 2, 0, 1, 2, 3, 0]
    assert reader.empirical is not None
    assert reader.empirical.code(reader.code("small"), "keys", 0, 0).n_cells == (8, 2)
