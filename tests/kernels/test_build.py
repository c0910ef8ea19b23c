"""Building: a pure function with a cache that survives interruption, and errors one can read."""

from __future__ import annotations

from pathlib import Path

import pytest

from sphkv_kernels.build import KernelBuildError, build_key, compile_cubin

pytest.importorskip("cuda.core", reason="cuda-core (extra `cuda`) is not installed")
EMPTY = 'extern "C" __global__ void nothing() {}'


def test_second_build_comes_from_the_cache(tmp_path: Path) -> None:
    first = compile_cubin(EMPTY, 90, folder=tmp_path)
    (entry,) = tmp_path.iterdir()
    assert entry.name == f"{build_key(EMPTY, 90)}.cubin"
    entry.write_bytes(b"from the cache")
    assert compile_cubin(EMPTY, 90, folder=tmp_path) == b"from the cache"
    assert compile_cubin(EMPTY, 90, folder=tmp_path, use_cache=False) == first


def test_key_names_everything_a_build_depends_on() -> None:
    assert build_key(EMPTY, 90) == build_key(EMPTY, 90)
    assert build_key(EMPTY, 90) != build_key(EMPTY, 80)
    assert build_key(EMPTY, 90) != build_key(EMPTY + " ", 90)


def test_compilers_own_text_reaches_the_user(tmp_path: Path) -> None:
    with pytest.raises(KernelBuildError, match="undefined_name"):
        compile_cubin("__device__ int f() { return undefined_name; }", 90, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cached_build_that_cannot_be_read_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compile_cubin(EMPTY, 90, folder=tmp_path)

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert compile_cubin(EMPTY, 90, folder=tmp_path) == first
