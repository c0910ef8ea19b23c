"""allocation.h5: version 1 loads for ever; what is damaged is refused with the way to mend it."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from sphkv_cli.allocation.calibration import CalibrationTables
from sphkv_cli.allocation.estimator_store import stored_estimator
from sphkv_cli.allocation.policy import QuotaPolicy
from sphkv_cli.artifacts.allocation import AllocationReader
from sphkv_cli.artifacts.header import ArtifactRef
from sphkv_cli.artifacts.store import verify_digest
from sphkv_cli.errors import ArtifactError

ARCHIVED = Path(__file__).parent / "archive" / "allocation-v1.h5"


def test_version_1_loads() -> None:
    assert verify_digest(ARCHIVED)
    with AllocationReader(ARCHIVED) as reader:
        assert reader.header.version == 1
        assert (reader.info.model, reader.info.page_size) == ("synthetic", 16)
        assert [tier.name for tier in reader.tiers] == ["polar-311-r1", "int8", "dense"]
        (document,) = reader.documents_of("judge")
        tiers, pages = reader.tier_of_token(document), reader.page_of_token(document)
        assert tiers.shape == pages.shape == (1, 1, 64)
        assert tiers.dtype == np.int8
        assert pages.dtype == np.int32
        assert document.laid_out_bytes <= document.budget_bytes
        for page in range(4):
            assert np.unique(tiers[0, 0][pages[0, 0] == page]).size == 1
        assert reader.frames.head_dim == 16
        calibration = reader.calibration
        assert calibration is not None
        tables = CalibrationTables(
            calibration.starts, calibration.log_scores, calibration.log_values
        )
        assert np.all(tables.expected(np.ones((1, 1, 3)), "drop") > 0)
        assert reader.score_arrays == {}
        assert stored_estimator(reader).name == reader.info.utility["name"] == "window"
        np.testing.assert_array_equal(reader.drop_coefficients, [[reader.info.drop_coefficient]])
        np.testing.assert_array_equal(reader.code_coefficients, [[1.0]])
        policy = QuotaPolicy.from_fractions(reader.quotas)
        assert policy.at_least.shape == (1, 1, 3)
        vectors = torch.randn(5, 1, 16, generator=torch.Generator().manual_seed(0))
        code = reader.tiers[0].key_code
        assert code is not None
        in_frame = reader.frames.keys_to_frame(0, vectors)
        error = ((code.decode(code.encode(in_frame)) - in_frame) ** 2).sum()
        assert float(error / (in_frame**2).sum()) < 0.5


@pytest.fixture
def copied(allocation, tmp_path: Path) -> Path:
    _, path = allocation
    shutil.copy(path, tmp_path / "a.h5")
    return tmp_path / "a.h5"


def refused(path: Path, words: str) -> None:
    with pytest.raises(ArtifactError, match=words) as caught, AllocationReader(path):
        pass
    assert "\n" not in str(caught.value)
    assert "sphkv" in str(caught.value)


def test_damaged_files_are_refused(copied: Path) -> None:
    def without(name: str) -> None:
        with h5py.File(copied, "r+") as file:
            del file[name]

    without("documents/000/page_of_token")
    refused(copied, r"a.h5 is truncated or damaged \(.*page_of_token")


def test_wrong_shapes_are_refused(copied: Path) -> None:
    with h5py.File(copied, "r+") as file:
        del file["policy/quotas"]
        file["policy/quotas"] = np.zeros((2, 2, 3))
    refused(copied, r"damaged \(quotas have shape")


def test_tiers_that_are_not_there_are_refused(copied: Path) -> None:
    with h5py.File(copied, "r+") as file:
        file["documents/000/tier_of_token"][0, 0, 0] = 99
    with AllocationReader(copied) as reader:
        _ = reader.page_of_token(reader.documents[0])  # the rest is whole
        with pytest.raises(ArtifactError, match=r"damaged \(tier_of_token has .* to 99"):
            reader.tier_of_token(reader.documents[0])


def test_another_rotation_is_refused(copied: Path) -> None:
    with h5py.File(copied, "r+") as file:
        file["frames/rotation_matrix"][0] *= -1
    refused(copied, "damaged")


def test_newer_truncated_and_foreign_files_are_refused(copied: Path, chain, tmp_path: Path) -> None:
    refused(chain.capture, "holds capture, not allocation")
    refused(tmp_path / "none.h5", "does not exist; make it with `sphkv allocate`")
    half = tmp_path / "half.h5"
    half.write_bytes(copied.read_bytes()[: copied.stat().st_size // 2])
    refused(half, "truncated or damaged")
    with h5py.File(copied, "r+") as file:
        file.attrs["version"] = 3
    refused(copied, "version 3.*upgrade")


def test_another_capture_is_refused(allocation) -> None:
    _, path = allocation
    with AllocationReader(path) as reader:
        other = ArtifactRef("capture", "ab" * 32, "other.h5")
        with pytest.raises(ArtifactError, match="was made from another capture"):
            reader.require_capture(other)


def test_a_closed_reader_says_so(allocation) -> None:
    _, path = allocation
    reader = AllocationReader(path)
    with pytest.raises(RuntimeError, match="outside its `with` block"):
        _ = reader.tiers
