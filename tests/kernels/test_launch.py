"""What a launch refuses before the driver sees it; no GPU is needed for that."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels import launch
from sphkv_kernels.build import compile_cubin
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.cache_builder import build_cache
from sphkv_kernels.decode import launch_params
from sphkv_kernels.framing import _require_grid
from sphkv_kernels.kernel_structs import KernelParams
from sphkv_kernels.plan import make_plan
from sphkv_kernels.tier import PageError, TierFormat
from sphkv_kernels.tier_dispatch import require_readable
from sphkv_kernels.variant import Variant
from tests.kernels.cases import even_code, plan_without_kernels, random_tokens

TIER = TierFormat.spherical(SphericalCode.analytic("code", 64, (4, 2, 2, 2), "lloyd_max:2"))


def cache() -> PagedCache:
    tokens = random_tokens(40, 2, 64, 1, 16, 3, drop_fraction=0.0)
    return build_cache((TIER,), 16, (tokens,))


def params(query: torch.Tensor, **options: object) -> object:
    one = plan_without_kernels(cache())
    arguments = {"logit_offset": None, "window": 0, "query_positions": None, **options}
    return launch_params(query, one, **arguments)  # type: ignore[arg-type]


def test_a_launch_is_for_the_plans_own_query() -> None:
    params(torch.zeros(1, 8, 64))
    for wrong in (torch.zeros(1, 2, 64), torch.zeros(1, 8, 8), torch.zeros(2, 8, 64)):
        with pytest.raises(PageError, match="query is"):
            params(wrong)
    with pytest.raises(PageError, match="multiple of 16 bytes"):
        params(torch.zeros(8 * 64 + 1)[1:].view(1, 8, 64))
    with pytest.raises(PageError, match="use float32"):
        params(torch.zeros(1, 8, 64, dtype=torch.float64))


@pytest.mark.parametrize("window", [-1, 1 << 31, 1 << 32])
def test_a_window_that_a_kernel_cannot_count_is_refused(window: int) -> None:
    with pytest.raises(PageError, match="window"):
        params(torch.zeros(1, 8, 64), window=window)


def test_half_a_position_term_is_refused() -> None:
    with pytest.raises(PageError, match="come together"):
        params(torch.zeros(1, 8, 64), frequencies=torch.zeros(2, 4))


def test_a_cache_of_no_sequence_has_no_plan() -> None:
    with pytest.raises(PageError, match="no sequence"):
        make_plan(cache().select_sequences([]), 4)


def test_codes_without_a_decoder_are_refused() -> None:
    require_readable((TIER, TierFormat.int8(), TierFormat.dense()))
    for code in (even_code(64, (16, 4), "fp16"), even_code(64, (16, 4, 4, 4), "fp16", "rope")):
        with pytest.raises(PageError, match="no native layout"):
            require_readable((TierFormat.spherical(code),))


def test_a_thread_that_has_no_context_gets_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    results = [driver.CUresult.CUDA_ERROR_INVALID_CONTEXT, driver.CUresult.CUDA_SUCCESS]
    calls: list[str] = []

    def launched(*arguments: object) -> tuple[object]:
        calls.append("launch")
        return (results[min(len(calls) - 1, 1)],)

    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: calls.append("synchronize"))
    monkeypatch.setattr(driver, "cuLaunchKernel", launched)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    arguments = (None, (1, 1), 32, 0, torch.device("cuda", 0), KernelParams())
    launch.launch_function(*arguments)
    assert calls == ["launch", "synchronize", "launch"]
    results[:] = [driver.CUresult.CUDA_ERROR_INVALID_VALUE] * 2
    with pytest.raises(launch.KernelLaunchError, match="INVALID_VALUE"):
        launch.launch_function(*arguments)


def test_new_codes_are_not_loaded_in_a_capture_though_their_kernel_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(launch, "load_function", lambda *_: object())
    with pytest.raises(launch.KernelLaunchError, match="run the same step once before"):
        launch.load_kernel(Variant((TIER,), 64, 1), torch.device("cuda", 0))


def test_a_grid_that_no_launch_takes_is_refused() -> None:
    _require_grid("outputs", 8 * 65_535, 8)
    with pytest.raises(PageError, match="524281 outputs: a launch takes up to 524280"):
        _require_grid("outputs", 8 * 65_535 + 1, 8)


def test_an_architecture_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(PageError, match=r"compute capability 7\.5"):
        launch.capability_of(torch.device("cuda", 0))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    check_that_a_build_survives(tmp_path)


def test_a_cache_folder_that_is_a_file_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_that_a_build_survives(tmp_path / "file")


def check_that_a_build_survives(folder: Path) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core (extra `cuda`) is not installed")
    with pytest.warns(UserWarning, match="XDG_CACHE_HOME"):
        assert compile_cubin('extern "C" __global__ void nothing() {}', 90, folder=folder)
