"""What `sphkv doctor` says of a GPU, by its compute capability."""

from types import SimpleNamespace

import pytest
import torch

from sphkv_cli.doctor.checks import Check, diagnose
from sphkv_kernels.tier import PageError, TierFormat
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
def test_a_gpu_with_room_for_all_tiers_or_without(
    capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fits(tier: TierFormat) -> bool:
        try:
            kernel_source(Variant((tier,), 128, 1), capability)
        except PageError:
            return False
        return True

    without = [tier for tier in native_tiers(128) if not fits(tier)]
    check = gpu_of(monkeypatch, *divmod(capability, 10))
    assert check.ok
    assert ("no room for 4/3/3/3" in check.finding) == bool(without)
    for tier in without:
        assert any(
            code is not None and [book.n_cells for book in code.codebooks] == [16, 8, 8, 8]
            for code in (tier.key_code, tier.value_code)
        )
