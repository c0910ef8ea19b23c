"""Reading a capture: the archived version 1, bfloat16, and files that are not whole."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphkv_cli.artifacts.bfloat16 import bfloat16_bits, from_bfloat16_bits
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.store import verify_digest
from sphkv_cli.errors import ArtifactError

ARCHIVED = Path(__file__).parent / "archive" / "capture-v1.h5"


def test_a_capture_of_version_1_loads_for_ever() -> None:
    assert verify_digest(ARCHIVED)
    with CaptureReader(ARCHIVED) as reader:
        assert reader.digest == "16bb74af9485828b31014706619f7d213fbf8f99cf5fe2873a25dc5e65e94678"
        assert reader.header.version == 1
        assert (reader.model, reader.n_layers, reader.group_size) == ("synthetic", 2, 2)
        assert [d.split for d in reader.documents] == ["fit", "select", "judge"]
        assert reader.layers[1].softmax_scale == 0.25
        last = [-1.9453125, -0.61328125, 0.65625, 1.046875]
        assert reader.keys(2, 1)[47, 1, :4].tolist() == last
        assert reader.keys(reader.documents[2], 1, slice(47, 48))[0, 1, :4].tolist() == last
        first = [-0.734375, -1.515625, -2.96875, 1.1484375]
        assert reader.queries(2, 1)[0, 3, :4].tolist() == first
        assert reader.query_positions(0)[:11].tolist() == [3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 40]
        assert reader.token_ids(1)[:4].tolist() == [215, 584, 605, 531]
        assert reader.query_mean[1, 2, 3] == np.float32(0.694171667098999)
        with pytest.raises(ArtifactError, match="no keys before RoPE"):
            reader.keys_pre_rope(0, 0)
        with pytest.raises(IndexError):
            reader.keys(3, 0)
        with pytest.raises(IndexError):
            reader.keys(0, 2)


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_bfloat16_is_rounded_as_torch_rounds(values: list[float]) -> None:
    import torch

    x = np.array(values, dtype=np.float32)
    expected = torch.from_numpy(x).to(torch.bfloat16).float().numpy()
    found = from_bfloat16_bits(bfloat16_bits(x))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_capture_is_refused(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "capture.h5"
    content = ARCHIVED.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with (
        pytest.raises(ArtifactError, match=r"capture\.h5 .*sphkv capture"),
        CaptureReader(path) as reader,
    ):
        for document in reader.documents:
            for layer in range(reader.n_layers):
                reader.keys(document, layer)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("name", ["query_mean", "query_second_moment"])
def test_statistics_that_are_no_numbers_are_refused(
    name: str, value: float, tmp_path: Path
) -> None:
    path = tmp_path / "capture.h5"
    shutil.copy(ARCHIVED, path)
    with h5py.File(path, "a") as file:
        file[name][1, 0, 2] = value
    with CaptureReader(path) as reader:
        _ = reader.query_second_moment(0)  # the other layer is whole
        with pytest.raises(ArtifactError, match=f"{name} holds NaN or Inf.*sphkv capture"):
            _ = reader.query_mean if name == "query_mean" else reader.query_second_moment(1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_weights_that_cannot_be_are_refused(value: float, tmp_path: Path) -> None:
    path = tmp_path / "capture.h5"
    shutil.copy(ARCHIVED, path)
    with h5py.File(path, "a") as file:
        file["output_weight"][1, 0] = value
    with (
        pytest.raises(ArtifactError, match=r"output_weight .*sphkv capture"),
        CaptureReader(path) as reader,
    ):
        _ = reader.output_weight


@pytest.mark.parametrize(
    ("name", "message"),
    [("layers", "layers"), ("documents", "documents"), ("documents/001/layers/01/keys", "keys")],
)
def test_a_capture_that_lacks_a_part_is_refused(name: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "capture.h5"
    shutil.copy(ARCHIVED, path)
    with h5py.File(path, "a") as file:
        del file[name]
    with (
        pytest.raises(ArtifactError, match=rf"damaged \(.*{message}.*sphkv capture"),
        CaptureReader(path) as reader,
    ):
        reader.keys(1, 1)


@pytest.mark.parametrize(
    ("attribute", "value"), [("stored_as", "int4"), ("n_kv_heads", 3), ("n_layers", 7)]
)
def test_a_capture_that_contradicts_itself_is_refused(
    attribute: str, value: object, tmp_path: Path
) -> None:
    path = tmp_path / "capture.h5"
    shutil.copy(ARCHIVED, path)
    with h5py.File(path, "a") as file:
        file.attrs[attribute] = value
    with pytest.raises(ArtifactError, match="truncated or damaged"), CaptureReader(path):
        pass


def test_a_capture_of_a_newer_version_or_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "capture.h5"
    shutil.copy(ARCHIVED, path)
    with h5py.File(path, "a") as file:
        file.attrs["version"] = 2
    with pytest.raises(ArtifactError, match="version 2"), CaptureReader(path):
        pass
    with h5py.File(path, "a") as file:
        file.attrs["version"] = 0
    with pytest.raises(ArtifactError, match=r"damaged header .version 0"), CaptureReader(path):
        pass
    with h5py.File(path, "a") as file:
        file.attrs["version"] = 1
        file.attrs["kind"] = "codebooks"
    with pytest.raises(ArtifactError, match="holds codebooks, not capture"), CaptureReader(path):
        pass
