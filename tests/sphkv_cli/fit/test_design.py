"""The designer measures its leaders, chooses the best that loses no head, and says so."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sphkv_cli.artifacts.codebooks import CodebooksReader
from sphkv_cli.blocks import Line, Table
from sphkv_cli.errors import UsageError
from sphkv_cli.fit.candidates import laid_out_rate
from sphkv_cli.fit.design import choose
from sphkv_cli.fit.design_codes import leading_designs, native_designs, rows_fit, split_rates
from sphkv_cli.fit.design_rows import DesignTables
from sphkv_cli.fit.design_view import read_design
from sphkv_cli.fit.options import FitOptions, parse_sweep
from sphkv_cli.fit.stage import FitResult, fit_codebooks
from sphkv_cli.fit.view import view
from sphkv_cli.render import plain
from sphkv_codebooks.search import SearchSpace, best_code
from sphkv_kernels.block_words import native_layout_of


def sharp(
    rng: np.random.Generator, kind: str, document: int, layer: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Queries three times as long: attention that key errors can move."""
    return rng.standard_normal(shape) * (3.0 if kind == "queries" else 1.0)


@pytest.fixture(scope="module")
def designed(tmp_path_factory: pytest.TempPathFactory) -> tuple[FitResult, Path]:
    from tests.sphkv_cli.fit.conftest import CaptureCase, write

    folder = tmp_path_factory.mktemp("design")
    case = CaptureCase(draw=sharp, n_tokens=220, n_layers=1, head_dim=64, query_stride=4)
    capture = write(folder / "capture.h5", case)
    options = FitOptions(target_rates=(2.25, 3.25), centring="none")
    return fit_codebooks(options, capture, folder / "codebooks.h5"), folder


def test_the_choice_has_the_least_error_of_those_that_lose_no_head(
    designed: tuple[FitResult, Path],
) -> None:
    result, _ = designed
    assert result.design is not None
    assert result.design.rates == (2.25, 3.25)
    for rate in (2.25, 3.25):
        rows = result.design.of_rate(rate)
        assert len(rows) >= 6
        assert any(row.has_kernel_layout for row in rows)
        assert all(row.code_rate <= rate + 1e-9 for row in rows)
        (chosen,) = [row for row in rows if row.is_chosen]
        kept = [row for row in rows if not row.is_vetoed]
        assert chosen.output_error == min(row.output_error for row in kept)
        assert all(row.is_vetoed == (row.worst_output_error >= 1.0) for row in rows)
        assert all(row.instructions > 0 for row in rows if row.has_kernel_layout)
        assert all(math.isnan(row.instructions) for row in rows if not row.has_kernel_layout)
    coarse, fine = (result.design.of_rate(rate)[0].output_error for rate in (2.25, 3.25))
    assert fine < coarse


def test_sharp_attention_wants_finer_keys_than_values(designed: tuple[FitResult, Path]) -> None:
    result, folder = designed
    (chosen,) = [row for row in result.design.rows if row.is_chosen and row.target_rate == 3.25]
    books = CodebooksReader.open(folder / "codebooks.h5")
    tier = next(tier for tier in books.tiers if tier.name == chosen.name)
    assert tier.key_code.code_rate > tier.value_code.code_rate


def test_the_chosen_pairs_and_the_best_for_the_kernel_are_the_tiers(
    designed: tuple[FitResult, Path],
) -> None:
    result, folder = designed
    books = CodebooksReader.open(folder / "codebooks.h5")
    names = {tier.name for tier in books.tiers}
    native = {
        tier.name
        for tier in books.tiers
        if native_layout_of(tier.key_code) and native_layout_of(tier.value_code)
    }
    for rate in result.design.rates:
        rows = result.design.of_rate(rate)
        assert {row.name for row in rows if row.is_chosen} <= names
        assert next(row.name for row in rows if row.has_kernel_layout) in native
    assert len(books.tables.design) == len(result.design.rows)
    used = {code.name for tier in books.tiers for code in (tier.key_code, tier.value_code)}
    assert {code.name for code in books.codes} == used
    # Pages of 32 rows: no byte above the rate that was asked for.
    for tier in books.tiers:
        laid_out = sum(laid_out_rate(code, 32) for code in (tier.key_code, tier.value_code))
        assert laid_out / 2 <= 3.25 + 1e-9


def test_what_is_shown_says_what_was_chosen(designed: tuple[FitResult, Path]) -> None:
    result, _ = designed
    *sentences, last = read_design(result.design)
    assert "--native-only leaves them out" in last
    assert len(sentences) == 2
    for sentence, rate in zip(sentences, result.design.rates, strict=True):
        (chosen,) = [row for row in result.design.of_rate(rate) if row.is_chosen]
        assert sentence.startswith(f"At {rate:g} bits")
        assert chosen.name in sentence
    blocks = view(result)
    titles = [block.title for block in blocks if isinstance(block, Table)]
    assert any("limit 4^-rate" in title for title in titles)
    assert {"At 2.25 bits", "At 3.25 bits"} <= set(titles)
    lines = [block.text for block in blocks if isinstance(block, Line)]
    assert any("the first 4 stay dense" in line for line in lines)
    assert plain(result)["design"]["rows"]


def test_a_pair_that_loses_a_head_is_not_chosen(designed: tuple[FitResult, Path]) -> None:
    result, _ = designed
    assert result.design is not None
    first, second, third, *_ = result.design.of_rate(3.25)
    lost = replace(first, worst_output_error=1.5, is_vetoed=1, is_chosen=0)
    assert choose([lost, second, third]) is second
    assert choose([third, second, first]) is first
    worse = replace(second, worst_output_error=1.2, is_vetoed=1, is_chosen=0)
    # Where all lose a head the least bad is kept, and the sentence warns.
    assert choose([lost, worse]) is worse
    assert choose([]) is None
    rows = (replace(worse, is_chosen=1), lost)
    sentence = read_design(DesignTables((), rows, ""))[0]
    assert "not recommended" in sentence
    rows = (replace(second, is_chosen=1, has_kernel_layout=0), replace(lost, has_kernel_layout=1))
    sentence, _ = read_design(DesignTables((), rows, ""))
    assert sentence.endswith(f"{lost.name}, loses a head.")


def test_native_only_chooses_what_the_kernel_reads(
    make_capture: Callable[..., Path], tmp_path: Path
) -> None:
    capture = make_capture(n_tokens=120, n_layers=1, head_dim=64, query_stride=4)
    options = FitOptions(target_rates=(3.25,), native_only=True)
    result = fit_codebooks(options, capture, tmp_path / "c.h5")
    assert result.design is not None
    assert all(row.has_kernel_layout for row in result.design.rows)
    with pytest.raises(UsageError, match="CUDA kernel reads"):
        options = FitOptions(target_rates=(1.5,), native_only=True)
        fit_codebooks(options, capture, tmp_path / "d.h5")
    assert not (tmp_path / "d.h5").exists()


@pytest.mark.parametrize("head_dim", [8, 16, 64, 128, 256])
def test_leaders_fit_their_rate_and_the_first_is_the_best(head_dim: int) -> None:
    designs = leading_designs(head_dim, 3.25, native_only=False)
    fits = rows_fit(head_dim, 3.25)
    assert all(fits(design) and design.rate <= 3.25 + 1e-9 for design in designs)
    # What whole bytes cost: a few per cent of D, more where a vector has few bits.
    unpacked = best_code(SearchSpace(head_dim), 3.25).distortion
    assert designs[0].distortion < unpacked * (1.02 if head_dim >= 64 else 1.2)
    native = native_designs(head_dim, 3.25)
    assert bool(native) == (head_dim >= 64)


def test_the_split_of_rates_is_the_water_filling_one() -> None:
    # Four times the slope is worth one bit of difference.
    assert split_rates(3.0, 4.0, 1.0, 64)[0] == (3.5, 2.5)
    assert split_rates(3.0, 1.0, 4.0, 64)[0] == (2.5, 3.5)
    assert split_rates(3.0, 1.0, 1.0, 64) == []
    assert split_rates(3.0, 0.0, 1.0, 64) == []
    for key, value in split_rates(3.25, 3.0, 1.0, 128):
        assert (key * 128 / 8).is_integer()
        assert key + value == 6.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_rates": (0.1,)}, "target rate is 0.1"),
        ({"target_rates": (math.nan,)}, "target rate is nan"),
        ({"target_rates": (3.0, 3.0)}, "named twice"),
        ({"target_rates": (3.0,), "codes": ("4/2",)}, "--target-rate chooses"),
        ({"native_only": True}, "--native-only"),
    ],
)
def test_what_cannot_be_designed_is_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        FitOptions(**options)  # type: ignore[arg-type]
    assert says in caught.value.message


def test_a_sweep_has_both_ends() -> None:
    assert parse_sweep("2:3:0.25") == (2.0, 2.25, 2.5, 2.75, 3.0)
    assert parse_sweep("2:2:1") == (2.0,)
    for text in ("2:3", "3:2:0.1", "a:b:c", "2:3:0", "0:3:1", "1:8:0.01", "nan:3:1"):
        with pytest.raises(UsageError, match="sweep"):
            parse_sweep(text)
