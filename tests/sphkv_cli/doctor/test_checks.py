"""What `sphkv doctor` says of a GPU, by its compute capability."""

from types import SimpleNamespace

import pytest
import torch

from sphkv_cli.doctor.checks import Check, diagnose
from sphkv_kernels.variant import SHARED_BYTES, Variant, kernel_source
from tests.kernels.cases import native_tiers


def gpu_of(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> Check:
    found = SimpleNamespace(name="a GPU", major=major, minor=minor, total_memory=24 << 30)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    return next(check for check in diagnose().checks if check.subject == "GPU")


def test_a_gpu_that_no_kernel_is_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability in ((7, 5), (13, 0)):
        check = gpu_of(monkeypatch, *capability)
        assert not check.ok
        assert "built for sm_80, sm_86" in check.finding


@pytest.mark.parametrize("capability", sorted(SHARED_BYTES))
def test_a_gpu_that_kernels_are_built_for_has_all_tiers(
    capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu_of(monkeypatch, *divmod(capability, 10)).ok
    for tier in native_tiers(128):
        kernel_source(Variant((tier,), 128, 1), capability)
    kernel_source(Variant(native_tiers(128)[:9], 128, 1), capability)
