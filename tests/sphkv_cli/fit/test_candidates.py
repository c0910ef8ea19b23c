"""Which codes become tiers: those that run where they are proved, or those that were asked for."""

import pytest

from sphkv_cli.errors import UsageError
from sphkv_cli.fit.candidates import candidate_codes, candidate_tiers
from sphkv_cli.fit.options import FitOptions
from sphkv_cli.fit.reading import read_tiers
from sphkv_kernels.block_words import native_layout_of


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_default_tiers_are_codes_that_the_kernel_reads(head_dim: int) -> None:
    options = FitOptions()
    codes = candidate_codes(options, head_dim)
    tiers = {tier.name for tier in candidate_tiers(options, codes)}
    assert tiers == {code.name for code in codes if native_layout_of(code) is not None}
    assert "paper-4222" in tiers
    left_out = {code.name for code in codes} - tiers
    assert left_out
    (said,) = read_tiers([c.name for c in codes], sorted(tiers), are_named=False)
    assert all(name in said for name in left_out)
    assert "does not read it; name it with --tier" in said and "no --tier" not in said


def test_small_head_dimensions_keep_every_code() -> None:
    codes = candidate_codes(FitOptions(), 16)
    assert len(candidate_tiers(FitOptions(), codes)) == len(codes)


def test_what_is_asked_for_becomes_a_tier() -> None:
    options = FitOptions(codes=("full=4/2/2/2/2/3:norm", "4/2/2/2:fp16"))
    codes = candidate_codes(options, 64)
    assert {tier.name for tier in candidate_tiers(options, codes)} == {c.name for c in codes}
    assert read_tiers([c.name for c in codes], [c.name for c in codes], are_named=False) == ()
    named = FitOptions(codes=options.codes, tiers=(f"{codes[0].name}/{codes[1].name}",))
    (tier,) = candidate_tiers(named, codes)
    assert tier.name == f"{codes[0].name}/{codes[1].name}"
    assert read_tiers([c.name for c in codes], [tier.name], are_named=True) == ()


def test_codes_that_no_tier_names_are_not_blamed_on_the_kernel() -> None:
    (said,) = read_tiers(["paper-4222", "polar-4222-r2", "a"], ["a/a"], are_named=True)
    assert said.startswith("paper-4222, polar-4222-r2: ")
    assert "no --tier names them" in said and "kernel" not in said


def test_a_tier_of_an_unknown_code_is_refused() -> None:
    options = FitOptions(tiers=("paper-4222/none-such",))
    with pytest.raises(UsageError, match="none-such"):
        candidate_tiers(options, candidate_codes(options, 64))
