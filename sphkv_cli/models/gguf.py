"""GGUF files: dequantised once and kept as a safetensors folder in the user's cache.

Dequantising takes 15-40 s for a small model; loading the result takes half a second. The folder is
named by the SHA-256 of the GGUF file, made under a temporary name and renamed when it is whole, so
that a killed conversion leaves nothing that a later run would trust.
"""

import contextlib
import io
import os
import shutil
import tempfile
from pathlib import Path

from sphkv_cli.errors import SphkvError
from sphkv_cli.models.packaged import file_sha256
from sphkv_cli.progress import NullProgress, Progress

# Part of the folder's name: to be raised when the conversion changes, so that old ones are unused.
_CONVERSION = "v1"


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/sphkv`, or `~/.cache/sphkv`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sphkv"


def converted_folder(sha256: str, cache_dir: Path | None = None) -> Path:
    """Where the conversion of the GGUF file with that SHA-256 lies, or will."""
    return (cache_dir or default_cache_dir()) / "models" / f"{sha256}-{_CONVERSION}"


def is_gguf(path: Path) -> bool:
    """Whether the file starts with the GGUF magic."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def safetensors_of(
    gguf: Path, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> Path:
    """The folder with the dequantised float16 model of a GGUF file; made when it is not cached.

    float16 keeps every dequantised weight to 2^-11 relative, far below the step of any GGUF type;
    a weight too large for it is refused.

    Raises:
        SphkvError: the file is damaged or of an architecture that transformers cannot read, or the
            cache cannot be written or is full.
    """
    progress = progress or NullProgress()
    folder = converted_folder(file_sha256(gguf), cache_dir)
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check_disk(gguf, folder.parent)
        made = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    except OSError as error:
        raise SphkvError(
            f"the cache {folder.parent} cannot be written ({error.strerror})",
            "set XDG_CACHE_HOME to a folder with room",
        ) from error
    progress.start(f"dequantising {gguf.name}", None, "")
    try:
        _convert(gguf, made)
        made.chmod(0o755)
        # Another process may have made the same folder meanwhile; its content is the same.
        with contextlib.suppress(OSError):
            made.rename(folder)
    finally:
        progress.finish()
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _check_disk(gguf: Path, parent: Path) -> None:
    # Two bytes per weight; four bits per weight is the usual least in a GGUF file.
    needed = 4 * gguf.stat().st_size
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise SphkvError(
            f"the cache {parent} has {free / 1e9:.1f} GB free, dequantising {gguf.name} may need "
            f"{needed / 1e9:.1f} GB",
            "free some space or set XDG_CACHE_HOME",
        )


def _convert(gguf: Path, folder: Path) -> None:
    from sphkv_cli.models.load import quiet_transformers, require_transformers

    require_transformers()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The reader of GGUF files draws its progress bar whatever transformers is told.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                gguf.parent, gguf_file=gguf.name, local_files_only=True
            )
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.float16,
                quantization_config=GgufConfig(dequantize=True),
                local_files_only=True,
            )
        except (OSError, ValueError, KeyError, ImportError, NotImplementedError) as error:
            raise SphkvError(
                f"{gguf.name} cannot be read ({str(error).splitlines()[0][:160]})",
                "check the file, or use the safetensors of the same model",
            ) from error
        for name, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                raise SphkvError(
                    f"{gguf.name}: {name} does not fit float16", "use the safetensors of the model"
                )
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
