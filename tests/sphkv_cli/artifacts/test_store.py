"""An artifact is whole or absent, names what it is, and has the digest of its content."""

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from sphkv_cli.artifacts.damage import reading
from sphkv_cli.artifacts.header import ArtifactRef, require_input
from sphkv_cli.artifacts.store import (
    artifact_ref,
    check_output,
    check_outputs,
    content_digest,
    create_artifact,
    open_artifact,
    read_header,
    require_unchanged,
    verify_digest,
)
from sphkv_cli.errors import ArtifactError, UsageError


def write(path: Path, *, kind: str = "capture", values: object = (1.0, 2.0), **options) -> None:
    options.setdefault("inputs", {})
    options.setdefault("provenance", {"seed": 42})
    with create_artifact(path, kind, **options) as file:
        file.create_dataset("group/keys", data=np.asarray(values)).attrs["axes"] = "n_tokens"
        file.attrs["model"] = "tiny"


def test_what_is_written_is_read_back_with_its_header(tmp_path: Path) -> None:
    ref = ArtifactRef("capture", "ab" * 32, "capture.h5")
    write(tmp_path / "c.h5", kind="codebooks", inputs={"capture": ref}, provenance={"seed": 7})
    with open_artifact(tmp_path / "c.h5", "codebooks") as file:
        assert file["group/keys"][()].tolist() == [1.0, 2.0]
    header = read_header(tmp_path / "c.h5")
    assert (header.kind, header.version, header.provenance) == ("codebooks", 2, {"seed": 7})
    assert header.inputs == {"capture": ref}
    assert verify_digest(tmp_path / "c.h5")


def test_digest_depends_on_content_and_on_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", provenance={"seed": 1})
    write(tmp_path / "b.h5", provenance={"seed": 2, "command": "other"})
    same = {read_header(tmp_path / name).digest for name in ("a.h5", "b.h5")}
    assert len(same) == 1
    write(tmp_path / "c.h5", values=(1.0, 2.5))
    write(tmp_path / "d.h5", values=np.asarray((1.0, 2.0), np.float32))
    write(tmp_path / "e.h5", inputs={"capture": ArtifactRef("capture", "00" * 32, "x.h5")})
    with create_artifact(tmp_path / "f.h5", "capture", inputs={}, provenance={}) as file:
        file.create_dataset("group/keys", data=[1.0, 2.0]).attrs["axes"] = "n_queries"
        file.attrs["model"] = "tiny"
    with create_artifact(tmp_path / "g.h5", "capture", inputs={}, provenance={}) as file:
        file.create_dataset("group/values", data=[1.0, 2.0]).attrs["axes"] = "n_tokens"
        file.attrs["model"] = "tiny"
    others = {read_header(tmp_path / f"{name}.h5").digest for name in "cdefg"}
    assert len(others) == 5
    assert not others & same


def test_digest_ignores_file_names_of_inputs_and_hdf5_layout(tmp_path: Path) -> None:
    for name, chunks, input_name in (("a", None, "one.h5"), ("b", (1,), "two.h5")):
        ref = ArtifactRef("capture", "cd" * 32, input_name)
        with create_artifact(
            tmp_path / name, "codebooks", inputs={"capture": ref}, provenance={}
        ) as file:
            file.create_dataset("x", data=np.arange(5), chunks=chunks)
    assert read_header(tmp_path / "a").digest == read_header(tmp_path / "b").digest


def test_changed_bytes_are_found(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["group/keys"][0] = 3.0
        assert content_digest(file) != file.attrs["digest"]
    assert not verify_digest(tmp_path / "a.h5")
    with pytest.raises(ArtifactError, match=r"was changed after .* `sphkv capture`"):
        require_unchanged(tmp_path / "a.h5")


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=r"exists; pass --force"):
        write(path, values=(9.0,))
    assert path.read_bytes() == before
    write(path, values=(9.0,), force=True)
    with open_artifact(path, "capture") as file:
        assert file["group/keys"][()].tolist() == [9.0]


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    os.mkfifo(path)
    with pytest.raises(ArtifactError, match="not a regular file"):
        write(path, force=True)
    assert path.is_fifo()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    path = tmp_path / "a.h5"
    write(path)
    before = path.read_bytes()
    with (
        pytest.raises(interruption),
        create_artifact(path, "capture", inputs={}, provenance={}, force=True) as file,
    ):
        file["half"] = [1]
        raise interruption
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]
    assert path.read_bytes() == before


def test_a_missing_file_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match=r"does not exist; make it with `sphkv fit-codebooks`"),
        open_artifact(tmp_path / "no.h5", "codebooks"),
    ):
        pass


def test_a_truncated_file_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path, values=np.arange(5000.0))
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(ArtifactError, match="truncated or damaged"), open_artifact(path, "capture"):
        pass


def test_a_foreign_file_is_named_as_such(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("hello")
    with pytest.raises(ArtifactError, match="not an HDF5 file"), open_artifact(text, "capture"):
        pass
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(ArtifactError, match="was not written by sphkv"):
        read_header(tmp_path / "other.h5")


def test_a_newer_version_and_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path)
    with (
        pytest.raises(ArtifactError, match="holds capture, not codebooks"),
        open_artifact(path, "codebooks"),
    ):
        pass
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 99
    with pytest.raises(ArtifactError, match=r"version 99, this sphkv reads up to 1; upgrade"):
        read_header(path)


def test_a_damaged_header_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path)
    with h5py.File(path, "r+") as file:
        file.attrs["inputs"] = json.dumps({"capture": {"kind": "capture"}})
    with pytest.raises(ArtifactError, match="damaged header"):
        read_header(path)


@pytest.mark.parametrize("structure", [b"TREE", b"HEAP", b"SNOD", b"GCOL", b"\x10\x00\x10\x00"])
def test_damage_names_the_file_whatever_structure_it_hits(tmp_path: Path, structure: bytes) -> None:
    path = tmp_path / "a.h5"
    write(path)
    content = path.read_bytes()
    assert structure in content
    path.write_bytes(content.replace(structure, bytes(len(structure))))
    with pytest.raises(ArtifactError, match=r"a\.h5 .*damaged.*; (re)?make it") as caught:
        require_unchanged(path)
    assert "\n" not in str(caught.value)


def test_a_defect_of_ours_is_not_called_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path)
    for defect in (RuntimeError, OSError, KeyError, ValueError):
        with pytest.raises(defect, match="ours"), open_artifact(path, "capture"):
            raise defect("ours")
    with pytest.raises(RuntimeError, match="ours"), reading(path, "capture"):
        raise RuntimeError("ours")
    with (
        pytest.raises(ArtifactError, match=r"damaged \(.*; make it again with `sphkv capture`"),
        h5py.File(path) as file,
        reading(path, "capture"),
    ):
        _ = file["group/no"]


def test_a_broken_chain_says_which_file_to_remake(tmp_path: Path) -> None:
    write(tmp_path / "one.h5", values=(1.0,))
    write(tmp_path / "two.h5", values=(2.0,))
    one, two = (artifact_ref(tmp_path / n, read_header(tmp_path / n)) for n in ("one.h5", "two.h5"))
    write(tmp_path / "codes.h5", kind="codebooks", inputs={"capture": one})
    header = read_header(tmp_path / "codes.h5")
    require_input(header, "capture", one, path="codes.h5")
    with pytest.raises(ArtifactError, match=r"another capture \(one.h5.*remake codes.h5"):
        require_input(header, "capture", two, path="codes.h5")
    with pytest.raises(ArtifactError, match="does not say which allocation"):
        require_input(header, "allocation", two, path="codes.h5")


def test_output_folder_must_exist_and_not_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist; make it first"):
        write(tmp_path / "no" / "a.h5")
    with pytest.raises(ArtifactError, match="is a folder"):
        write(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused() -> None:
    # /proc refuses new files to everybody, root included.
    with pytest.raises(ArtifactError, match=r"/proc/self.*(cannot|could not) be written"):
        write(Path("/proc/self/a.h5"))


def test_a_folder_that_refuses_files_is_named_by_its_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ArtifactError, match="cannot be written; choose another --plot"):
        check_output(tmp_path / "a.png", force=False, option="--plot")


def test_outputs_are_one_file_also_through_a_link_of_their_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    one, other = tmp_path / "real" / "a", tmp_path / "link" / "a"
    with pytest.raises(UsageError, match="--output and --html name the same file"):
        check_outputs({"--output": one, "--html": other}, {}, force=True)
    with pytest.raises(UsageError, match="CAPTURE and --output name the same file"):
        check_outputs({"--output": one}, {"--codebooks": None, "CAPTURE": other}, force=True)
    two = {"--output": one, "--html": tmp_path / "a", "--plot": None}
    check_outputs(two, {"CAPTURE": tmp_path / "real" / "b"}, force=False)


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    # A file size limit fails a write in the same place as a full disk, without needing one.
    script = """
import resource, sys
from pathlib import Path
import numpy as np
from sphkv_cli.artifacts.store import create_artifact
from sphkv_cli.errors import ArtifactError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with create_artifact(Path(sys.argv[1]), "capture", inputs={}, provenance={}) as file:
        file["x"] = np.ones(1 << 20)
except ArtifactError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a.h5")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "outgrew the file size limit" in done.stdout, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
