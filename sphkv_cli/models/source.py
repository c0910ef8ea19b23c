"""Which model is meant: the packaged default, a GGUF file, a local folder, or a hub id.

A local model never touches the network. A hub id costs one question to the hub, which tells an
unknown name from a missing network before transformers starts to retry.
"""

from dataclasses import dataclass
from pathlib import Path

from sphkv_cli.errors import EnvironmentUnable, SphkvError, UsageError
from sphkv_cli.models.gguf import is_gguf, safetensors_of
from sphkv_cli.models.packaged import PACKAGED, packaged_gguf
from sphkv_cli.models.split_model import SPLIT, split_model_folder
from sphkv_cli.progress import NullProgress, Progress

_HUB_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class ModelSource:
    """Where `transformers` finds a model.

    `name` is what artifacts record: a hub id, or the last part of a path, never a machine's folder.
    `location` is a folder or a hub id; `local_only` forbids the network.
    """

    name: str
    location: str
    local_only: bool
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def arguments(self) -> dict[str, object]:
        """The keyword arguments that every `from_pretrained` of this model takes."""
        return {
            "local_files_only": self.local_only,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
        }


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> ModelSource:
    """Find `model`; GGUF files are converted to safetensors once, in the user's cache.

    Args:
        model: a name of `PACKAGED` or `SPLIT` ("smollm2", "qwen2.5-coder-0.5b"), a .gguf file, a
            folder, or a hub id "owner/name".
        revision: branch, tag or commit of a hub model.
        trust_remote_code: let the model's own Python run.
        gguf_file: the name of a GGUF file inside the folder or hub repository `model`.
        cache_dir: where converted GGUF models lie; default `default_cache_dir()`.

    Raises:
        SphkvError: nothing of that name; the message says where it was looked for.
        EnvironmentUnable: the package or the network that it needs is missing.
    """
    progress = progress or NullProgress()
    if not model.strip():
        raise UsageError("--model is empty", "name a hub id, a folder or a .gguf file")
    if model in PACKAGED:
        _refuse(gguf_file, model, "--gguf-file")
        _refuse(revision, model, "--revision")
        folder = safetensors_of(packaged_gguf(model), cache_dir=cache_dir, progress=progress)
        return ModelSource(model, str(folder), local_only=True)
    if model in SPLIT:
        _refuse(gguf_file, model, "--gguf-file")
        _refuse(revision, model, "--revision")
        return ModelSource(
            model, str(split_model_folder(model, cache_dir=cache_dir)), local_only=True
        )
    path = Path(model).expanduser()
    if path.exists():
        _refuse(revision, model, "--revision")
        return _local(path, gguf_file, trust_remote_code, cache_dir, progress)
    if _looks_like_a_path(model):
        raise SphkvError(f"no model at {model}", "check the path")
    if gguf_file is not None:
        file = _download(model, gguf_file, revision)
        folder = safetensors_of(file, cache_dir=cache_dir, progress=progress)
        return ModelSource(f"{model}/{gguf_file}", str(folder), local_only=True)
    local_only = _ask_hub(model, revision)
    return ModelSource(model, model, local_only, revision, trust_remote_code)


def local_path(model: str | None, gguf_file: str | None = None) -> Path | None:
    """The file or folder of this disk that `resolve_model` would read, None where there is none."""
    if model is None or model in PACKAGED or model in SPLIT:
        return None
    path = Path(model).expanduser() / (gguf_file or "")
    return path if path.exists() else None


def _refuse(value: str | None, model: str, option: str) -> None:
    if value is not None:
        raise UsageError(f"{option} {value} means nothing for the local model {model}", "drop it")


def _local(
    path: Path,
    gguf_file: str | None,
    trust_remote_code: bool,
    cache_dir: Path | None,
    progress: Progress,
) -> ModelSource:
    name = path.resolve().name
    if gguf_file is not None:
        path = path / gguf_file
        name = gguf_file
        if not path.is_file():
            raise SphkvError(f"no GGUF file {gguf_file} in {path.parent}", "check --gguf-file")
    if path.is_file():
        if not is_gguf(path):
            raise SphkvError(f"{path} is not a GGUF file", "name a .gguf file or a model folder")
        folder = safetensors_of(path, cache_dir=cache_dir, progress=progress)
        return ModelSource(name, str(folder), local_only=True)
    if not (path / "config.json").is_file():
        inside = sorted(entry.name for entry in path.glob("*.gguf"))
        hint = f"pass --gguf-file {inside[0]}" if inside else "name a saved model"
        raise SphkvError(f"{path} has no config.json", hint)
    return ModelSource(name, str(path), local_only=True, trust_remote_code=trust_remote_code)


def _looks_like_a_path(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~")) or model.endswith(".gguf") or "\\" in model


def _ask_hub(model: str, revision: str | None) -> bool:
    """Ask the hub for the repository once; True means: offline, but everything is cached."""
    try:
        from huggingface_hub import HfApi, try_to_load_from_cache
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise missing_transformers() from error
    try:
        HfApi().model_info(model, revision=revision, timeout=_HUB_TIMEOUT_S)
    except HFValidationError as error:
        raise SphkvError(
            f"{model!r} is neither a folder, a .gguf file nor a hub id",
            f"a packaged model is called {' or '.join([*PACKAGED, *SPLIT])}",
        ) from error
    except GatedRepoError as error:
        raise SphkvError(
            f"the hub model {model} is gated", "accept its terms and run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise SphkvError(
            f"the hub has no public model {model!r}, and there is no folder of that name",
            "check the spelling, or run `hf auth login` for a private one",
        ) from error
    except RevisionNotFoundError as error:
        raise SphkvError(
            f"the hub model {model} has no revision {revision!r}", "check --revision"
        ) from error
    except Exception as error:
        # Every way of having no network (DNS, proxy, offline mode, time-out) means the same here.
        try:
            cached = try_to_load_from_cache(model, "config.json", revision=revision)
        except HFValidationError:
            cached = None
        if isinstance(cached, str):
            return True
        raise EnvironmentUnable(
            f"{model!r} is not a local folder and the hub cannot be reached "
            f"({type(error).__name__})",
            "check the network, or name a folder, a .gguf file or --model smollm2",
        ) from error
    return False


def _download(model: str, gguf_file: str, revision: str | None) -> Path:
    local_only = _ask_hub(model, revision)
    from huggingface_hub import hf_hub_download

    try:
        return Path(
            hf_hub_download(model, gguf_file, revision=revision, local_files_only=local_only)
        )
    except Exception as error:
        raise SphkvError(
            f"the hub model {model} has no file {gguf_file} that could be fetched "
            f"({type(error).__name__})",
            "check --gguf-file",
        ) from error


def missing_transformers() -> EnvironmentUnable:
    """The error for an installation without the extra that runs models."""
    return EnvironmentUnable(
        "running a model needs transformers, which is not installed", "pip install 'sphkv[hf]'"
    )
