"""compare on a small synthetic capture: closed forms, brute-force attention, equal bytes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from typer.testing import CliRunner

from sphkv_cli.app import app
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.report import Report
from sphkv_cli.capture.options import SyntheticOptions
from sphkv_cli.capture.synthetic import capture_synthetic
from sphkv_cli.comparison.candidates import POLAR
from sphkv_cli.comparison.judged_head import judged_heads
from sphkv_cli.comparison.options import CompareOptions
from sphkv_cli.comparison.polar_quantizer import PAGE_SIZE, packed_rate, polar_code_at
from sphkv_cli.comparison.result import CompareRow, Comparison
from sphkv_cli.comparison.stage import compare
from sphkv_cli.errors import SphkvError
from sphkv_cli.evaluation.protocol import UniformProtocol
from sphkv_cli.study.calibration import mean_frames
from sphkv_codebooks.comparators.coordinate_codebook import coordinate_codebook
from sphkv_codebooks.rotation import Rotation
from sphkv_kernels.pages import region_bytes

HEAD_DIM = 32


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "capture.h5"
    options = SyntheticOptions(
        n_layers=1,
        n_q_heads=2,
        n_kv_heads=1,
        head_dim=HEAD_DIM,
        n_documents=3,
        document_tokens=288,
    )
    capture_synthetic(options, path)
    return path


@pytest.fixture(scope="module")
def result(capture: Path) -> Comparison:
    return compare(CompareOptions(rates=(3.0,), seeds=2, max_queries=32), capture)


def row_of(result: Comparison, setting: str, *, is_centred: bool) -> CompareRow:
    (row,) = (r for r in result.rows if r.setting == setting and r.is_centred == is_centred)
    return row


def test_every_family_has_a_row_centred_and_one_not(result: Comparison) -> None:
    rows = {(row.family, row.setting) for row in result.rows}
    for family in ("TurboQuant-MSE", "TurboQuant-prod", "QJL", "KIVI", "spherical k-means"):
        assert any(family == name for name, _ in rows)
    for word in ("EDEN", "Wu et al.", "int per token", "fp8", POLAR, "the paper's"):
        assert any(word in name for name, _ in rows)
    assert len(result.rows) == 2 * len(rows)


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_measured_distortion_is_that_of_the_closed_form(result: Comparison, bits: int) -> None:
    row = row_of(result, f"TurboQuant-MSE {bits} bit", is_centred=True)
    expected = coordinate_codebook(HEAD_DIM, bits).distortion
    # Two rotations of 288 anisotropic keys: some per cent.
    assert row.centred_distortion == pytest.approx(expected, rel=0.08)
    assert row.value_distortion == pytest.approx(expected, rel=0.08)


def test_centring_helps_rotated_codes_of_biased_keys_and_hardly_kivi(result: Comparison) -> None:
    for setting, least in (("TurboQuant-MSE 3 bit", 1.5), ("KIVI-3", 0.9)):
        plain, centred = (row_of(result, setting, is_centred=c) for c in (False, True))
        assert plain.key_output_error / centred.key_output_error > least
    kivi = [row_of(result, "KIVI-3", is_centred=c).key_output_error for c in (False, True)]
    assert kivi[0] == pytest.approx(kivi[1], rel=0.05)  # its zero points centre already


def test_more_bits_never_hurt(result: Comparison) -> None:
    for family in ("TurboQuant-MSE", "KIVI", POLAR, "int per token"):
        ladder = [r for r in result.rows if r.family == family and r.is_centred]
        errors = [r.whole_output_error for r in ladder]
        assert len(errors) >= 4 and errors == sorted(errors, reverse=True)


def test_no_polar_code_takes_more_bytes_than_its_rival(result: Comparison) -> None:
    assert len(result.duels) >= 20
    for duel in result.duels:
        assert 0.9 * duel.rival_rate <= duel.polar_rate <= duel.rival_rate + 1e-9
        assert duel.is_level == (duel.polar_rate >= 0.98 * duel.rival_rate)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rate", [2.0, 3.0, 3.25])
def test_a_rate_is_what_a_page_holds(head_dim: int, rate: float) -> None:
    code = polar_code_at(head_dim, rate)
    assert code is not None
    page = region_bytes(code, head_dim, PAGE_SIZE)
    assert page * 8 <= rate * PAGE_SIZE * head_dim
    assert packed_rate(code) >= code.code_rate - 1e-9  # packing never gains
    worse = polar_code_at(head_dim, rate - 0.25)
    assert worse is not None and worse.distortion() > code.distortion()


def test_attention_is_that_of_a_brute_force_softmax(capture: Path) -> None:
    protocol = UniformProtocol(window=5, first_tokens=2, first_scored=8)
    with CaptureReader(capture) as reader:
        document = reader.documents_of("judge")[0]
        frame = mean_frames(reader, reader.documents_of("fit"), Rotation("none", HEAD_DIM))
        (judged,) = judged_heads(reader, document, 0, frame, protocol, 16)
        positions = reader.query_positions(document)
        keys, values = (
            x[:, 0].astype(np.float64)
            for x in (reader.keys(document, 0), reader.values(document, 0))
        )
    generator = torch.Generator().manual_seed(0)
    key_error = 0.3 * torch.randn(judged.keys.shape, generator=generator)
    new_values = judged.values + 0.3 * torch.randn(judged.values.shape, generator=generator)
    moved = judged.queries @ key_error.T
    kl, with_keys, with_both = judged.attention(judged.products + moved * judged.coded, new_values)
    rows = positions[positions >= 8]
    rows = rows[:: -(-rows.size // 16)]
    for i, position in enumerate(rows):
        query = judged.queries[1, i].double().numpy()
        read_keys, read_values = keys.copy(), values.copy()
        coded = slice(2, max(position - 5, 2))
        read_keys[coded] += key_error[coded].double().numpy()
        exact = log_softmax(HEAD_DIM**-0.5 * keys[: position + 1] @ query)
        found = log_softmax(HEAD_DIM**-0.5 * read_keys[: position + 1] @ query)
        read_values[coded] = new_values[coded].double().numpy()
        # float32 against float64: 1e-5 of numbers of order 1.
        assert float(kl[1, i]) == pytest.approx((np.exp(exact) * (exact - found)).sum(), abs=2e-5)
        for output, of_values in ((with_keys, values), (with_both, read_values)):
            expected = np.exp(found) @ of_values[: position + 1]
            np.testing.assert_allclose(output[1, i].double().numpy(), expected, atol=2e-5)


def test_the_report_says_what_was_said(capture: Path, tmp_path: Path) -> None:
    output, plot = tmp_path / "r.json", tmp_path / "r.png"
    words = ["compare", str(capture), "--method", "kivi", "--rates", "3", "--seeds", "1"]
    files = ["--output", str(output), "--plot", str(plot)]
    done = CliRunner().invoke(app, [*words, *files, "--json"])
    assert done.exit_code == 0, done.output
    written = Report.open(output).content["compare"]
    assert written["reading"] == json.loads(done.stdout)["reading"]
    assert "At 3 bits" in written["reading"][0]
    assert plot.read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(app, [*words, *files])
    assert again.exit_code == 1 and "--force" in again.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rates", "two"], "--rates"),
        (["--rates", "3,3"], "twice"),
        (["--rates", "99"], "between"),
        (["--method", "magic"], "choose among"),
        (["--seeds", "0"], "--seeds"),
    ],
)
def test_bad_words_are_one_line_and_a_usage_error(
    capture: Path, words: list[str], says: str
) -> None:
    found = CliRunner().invoke(app, ["compare", str(capture), *words])
    assert found.exit_code == 2
    assert says in found.stderr and found.stderr.count("\n") == 1


def test_rows_do_not_depend_on_who_else_takes_part(capture: Path, result: Comparison) -> None:
    options = CompareOptions(rates=(3.0,), methods=("kivi",), seeds=2, max_queries=32)
    kivi = [row for row in compare(options, capture).rows if row.family == "KIVI"]
    assert len(kivi) == 10
    for row in kivi:
        assert row == replace(
            row_of(result, row.setting, is_centred=row.is_centred), seed_spread=row.seed_spread
        )


def test_a_window_that_leaves_nothing_coded_is_refused(capture: Path, tmp_path: Path) -> None:
    output = tmp_path / "compare.json"
    # The last query, 287, has 283 tokens after the first 4: a window of 282 leaves it one.
    for window in (283, 1000):
        with pytest.raises(SphkvError, match=r"none of which is read coded.*lower --window"):
            compare(CompareOptions(seeds=1, window=window), capture, output=output)
    assert not output.exists()
    options = CompareOptions(rates=(3.0,), methods=("fp8",), seeds=1, max_queries=4)
    assert compare(replace(options, window=282), capture).rows
