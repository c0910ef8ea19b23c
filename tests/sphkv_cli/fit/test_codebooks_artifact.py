"""codebooks.h5 gives back what was written, bit for bit, or says what is wrong with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.codebooks import CodebooksReader
from sphkv_cli.artifacts.store import verify_digest
from sphkv_cli.errors import ArtifactError
from sphkv_cli.fit.options import FitOptions
from sphkv_cli.fit.stage import fit_codebooks
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode

CODES = ("4/2/2/2:fp16", "3/2:r2+rope", "4/2/2/2/3")


@pytest.fixture(scope="module")
def fitted(tiny_capture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fitted") / "codebooks.h5"
    fit_codebooks(FitOptions(codes=CODES, density="empirical"), tiny_capture, path)
    return path


@pytest.fixture
def copy(fitted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(fitted, tmp_path / "codebooks.h5"))


def test_codes_come_back_bit_for_bit(fitted: Path) -> None:
    reader = CodebooksReader.open(fitted)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    made = {
        "polar-4222-fp16": SphericalCode.analytic("a", 32, (4, 2, 2, 2), "fp16"),
        "polar-32-r2-rope": SphericalCode.analytic("b", 32, (3, 2), "lloyd_max:2", pairing="rope"),
        "polar-42223-norm": SphericalCode.analytic("c", 32, (4, 2, 2, 2, 3), "norm"),
    }
    assert {code.name for code in reader.codes} == set(made)
    for code in reader.codes:
        original = made[code.name]
        assert code.digest == original.digest
        assert (code.decode(code.encode(x)) == original.decode(original.encode(x))).all()
        for mine, theirs in zip(code.codebooks, original.codebooks, strict=True):
            assert mine.centroids.tobytes() == theirs.centroids.tobytes()
            assert mine.thresholds.tobytes() == theirs.thresholds.tobytes()


def test_frames_come_back_bit_for_bit(fitted: Path, tiny_capture: Path) -> None:
    reader = CodebooksReader.open(fitted)
    rotation = Rotation("hadamard", 32, 42)
    assert reader.frames.rotation.digest == rotation.digest
    assert reader.frames.rotation.matrix().tobytes() == rotation.matrix().tobytes()
    assert reader.frames.key_mean is not None
    with h5py.File(fitted) as file:
        assert file["frames/key_mean"][()].tobytes() == reader.frames.key_mean.tobytes()
        assert (file["frames/rotation_signs"][()] == rotation.signs).all()
    assert verify_digest(fitted)
    assert reader.ref.digest == reader.digest == reader.header.digest
    with CaptureReader(tiny_capture) as capture:
        assert reader.header.inputs["capture"].digest == capture.digest


def test_tiers_pair_each_code_with_itself_in_order(fitted: Path) -> None:
    reader = CodebooksReader.open(fitted)
    assert [tier.name for tier in reader.tiers] == [code.name for code in reader.codes]
    assert all(tier.key_code is tier.value_code for tier in reader.tiers)
    rates = [row.laid_out_rates[0] for row in reader.tables.codes]
    assert rates == sorted(rates)


def test_empirical_books_are_those_of_the_heads(fitted: Path) -> None:
    reader = CodebooksReader.open(fitted)
    assert reader.empirical is not None
    code = reader.code("polar-32-r2-rope")
    of_head = reader.empirical.code(code, "values", 1, 0)
    assert of_head.n_cells == code.n_cells
    assert (
        of_head.radius_coding == code.radius_coding
        or of_head.describe()["radius"] == (code.describe()["radius"])
    )
    other = reader.empirical.code(code, "values", 1, 1)
    assert of_head.codebooks != other.codebooks
    with h5py.File(fitted) as file:
        stored = file["empirical/rope/values/level_2/cells_4/centroids"][1, 0]
    assert (of_head.codebooks[1].centroids == stored).all()


def test_another_model_and_another_capture_are_refused(
    fitted: Path, tiny_capture: Path, make_capture: Callable[..., Path]
) -> None:
    reader = CodebooksReader.open(fitted)
    with CaptureReader(tiny_capture) as capture:
        reader.require_capture(capture)
    with CaptureReader(make_capture("same_model.h5", seed=8)) as capture:
        reader.require_model(capture)
        with pytest.raises(ArtifactError, match=r"made from another capture .*same_model"):
            reader.require_capture(capture)
    with (
        CaptureReader(make_capture("foreign.h5", model_digest="b" * 64)) as capture,
        pytest.raises(ArtifactError, match="was fitted on the model tiny") as caught,
    ):
        reader.require_model(capture)
    assert "sphkv fit-codebooks" in str(caught.value)


def test_an_unknown_code_is_named_with_the_known_ones(fitted: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no code 'x'.*polar-4222-fp16"):
        CodebooksReader.open(fitted).code("x")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(copy: Path, kept: float) -> None:
    content = copy.read_bytes()
    copy.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ArtifactError, match=r"truncated or damaged.*sphkv fit-codebooks"):
        CodebooksReader.open(copy)


def test_missing_foreign_and_newer_files_are_refused(
    copy: Path, tiny_capture: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        CodebooksReader.open(tmp_path / "nothing.h5")
    with pytest.raises(ArtifactError, match="holds capture, not codebooks"):
        CodebooksReader.open(tiny_capture)
    text = tmp_path / "text.h5"
    text.write_text("not an HDF5 file")
    with pytest.raises(ArtifactError, match="not an HDF5 file"):
        CodebooksReader.open(text)
    with h5py.File(copy, "r+") as file:
        file.attrs["version"] = 3
    with pytest.raises(ArtifactError, match="version 3"):
        CodebooksReader.open(copy)


def _change(path: str, index: tuple[int, ...], by: float) -> Callable[[h5py.File], None]:
    def damage(file: h5py.File) -> None:
        values = file[path][()]
        values[index] += by
        file[path][...] = values

    return damage


def _cut(path: str) -> Callable[[h5py.File], None]:
    def damage(file: h5py.File) -> None:
        values, attributes = file[path][()], dict(file[path].attrs)
        del file[path]
        file.create_dataset(path, data=values[..., :-1]).attrs.update(attributes)

    return damage


def _remove(path: str) -> Callable[[h5py.File], None]:
    def damage(file: h5py.File) -> None:
        del file[path]

    return damage


def _attribute(path: str, name: str, value: object) -> Callable[[h5py.File], None]:
    def damage(file: h5py.File) -> None:
        file[path].attrs[name] = value

    return damage


DAMAGES = {
    "matrix entry": (_change("frames/rotation_matrix", (0, 0), 1e-3), "rotation"),
    "matrix shape": (_cut("frames/rotation_matrix"), "rotation has shape"),
    "rotation digest": (_attribute("frames", "rotation_digest", "0" * 64), "recorded is 00000000"),
    "rotation seed": (
        _attribute(
            "frames", "rotation", json.dumps({"kind": "hadamard", "head_dim": 32, "seed": 1})
        ),
        "seed 1",
    ),
    "sign": (_change("frames/rotation_signs", (3,), 1), "signs"),
    "no mean": (_remove("frames/key_mean"), "key_mean"),
    "mean shape": (_cut("frames/key_mean"), "key_mean"),
    "mean of NaN": (_change("frames/key_mean", (0, 0, 0), np.nan), "key_mean"),
    "centring": (_attribute("frames", "centring", "sideways"), "centring"),
    "centroid": (_change("codes/000/level_1/centroids", (2,), 1e-12), "centroids of level 1"),
    "threshold": (_change("codes/001/level_2/thresholds", (0,), 1e-3), "thresholds of level 2"),
    "code digest": (_attribute("codes/000", "digest", "0" * 64), "digest"),
    "no description": (_remove("codes/002/description"), "description"),
    "no code": (_remove("codes/002"), "tier|polar"),
    "tier": (
        _attribute("/", "tiers", json.dumps([{"key_code": "x", "name": "x", "value_code": "x"}])),
        "x",
    ),
    "no tiers": (lambda file: file.attrs.__delitem__("tiers"), "tiers"),
    "head_dim": (_attribute("/", "head_dim", 64), "head_dim"),
    "n_layers": (_attribute("/", "n_layers", 3), "shape|layers"),
    "column": (_cut("tables/codes/code_rate"), "code_rate"),
    "no column": (_remove("tables/levels/bits"), "bits"),
    "measured": (_cut("measured/key_distortion"), "measured/key_distortion"),
    "energy": (_cut("measured/kept_key_energy"), "kept_key_energy"),
    "empirical book": (
        _change("empirical/rope/keys/level_2/cells_4/centroids", (0, 0, 0), 3.0),
        "level 2",
    ),
    "no empirical book": (_remove("empirical/rope/keys/level_2"), "level_2"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_contradicts_itself_is_refused_in_one_line(copy: Path, damage: str) -> None:
    change, says = DAMAGES[damage]
    with h5py.File(copy, "r+") as file:
        change(file)
    with pytest.raises(ArtifactError, match=says) as caught:
        CodebooksReader.open(copy)
    assert str(copy) in caught.value.message
    assert "\n" not in str(caught.value)
    assert "sphkv fit-codebooks" in caught.value.hint


def test_the_format_names_everything_in_the_file(fitted: Path) -> None:
    import sphkv_cli.artifacts

    text = (Path(sphkv_cli.artifacts.__file__).parent / "FORMAT.md").read_text()
    section = text.split("## codebooks, version 2")[1].split("\n## ")[0]
    header = text.split("## capture, version 1")[0]
    names: set[str] = set()

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        assert not isinstance(item, h5py.Dataset) or "axes" in item.attrs, name
        names.update(set(item.attrs) - {"axes", "unit"})
        parts = name.split("/")
        if parts[0] not in ("empirical", "codes"):
            names.add(parts[-1])

    with h5py.File(fitted) as file:
        file.visititems(visit)
        names.update(set(file.attrs))
    missing = [
        name
        for name in sorted(names)
        if not any(text in section for text in (f"`{name}`", f"/{name}`", f"`{name}/"))
        and f"`{name}`" not in header
    ]
    assert missing == []
