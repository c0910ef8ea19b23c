"""The study of books: codecs do what the codes do, and the reading follows the numbers."""

import numpy as np
import pytest
import torch

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.study.book_timing import (
    Cost,
    KiviCodec,
    PolarCodec,
    attend,
    measure_costs,
    synthetic_prompt,
)
from sphkv_cli.study.books import run
from sphkv_cli.study.books_report import Judged, read
from sphkv_cli.study.calibration import block_code, online_codes
from sphkv_cli.study.coding_errors import CodingErrors
from sphkv_cli.study.inputs import StudyInputs, StudyOptions
from sphkv_codebooks.comparators.kivi import KiviKeys, KiviValues
from sphkv_codebooks.rotation import Rotation


def test_a_timed_codec_codes_what_it_is_given() -> None:
    keys, values, _ = synthetic_prompt(96, 4, 2, 32, seed=1)
    kivi = KiviCodec(2)
    kivi.encode(keys, values)
    expected = KiviKeys(2).reconstruct(keys.transpose(0, 1))
    assert torch.equal(kivi.decode()[0], expected)
    assert torch.equal(kivi.decode()[1], KiviValues(2).reconstruct(values.transpose(0, 1)))

    code, rotation = block_code(32, (4, 2, 2, 2), "lloyd_max:2"), Rotation("hadamard", 32, 1)
    turned = rotation.apply(values)
    analytic = PolarCodec(code, rotation, None, online=False)
    analytic.encode(keys, values)
    plain = code.decode(code.encode(turned)).transpose(0, 1)
    assert torch.equal(analytic.decode()[1], plain)
    online = PolarCodec(code, rotation, None, online=True)
    online.prepare(keys, values)
    online.encode(keys, values)
    fitted = online_codes(code, rotation.apply(keys), turned)[1]
    assert torch.equal(online.decode()[1][1], fitted[1].decode(fitted[1].encode(turned[:, 1])))
    assert not torch.equal(online.decode()[1], plain)


def test_the_timed_read_is_attention() -> None:
    keys, values, queries = synthetic_prompt(50, 6, 2, 16, seed=2)
    expected = torch.nn.functional.scaled_dot_product_attention(
        queries[None, :, None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        enable_gqa=True,
    )[0, :, 0]
    found = attend(queries, keys.transpose(0, 1), values.transpose(0, 1))
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_cost_counts_fitting_in_prefill_only() -> None:
    keys, values, queries = synthetic_prompt(64, 2, 2, 16, seed=3)
    code, rotation = block_code(16, (4, 2, 2, 2), "lloyd_max:2"), Rotation("none", 16)
    online = PolarCodec(code, rotation, None, online=True)
    (cost,) = measure_costs([("online", code.code_rate, online)], keys, values, queries)
    assert 0 < cost.fit_ms < cost.prefill_ms
    assert cost.generation_ms == cost.token_ms + cost.read_ms


def judged(rotation: str, books: str, *output_errors: float) -> Judged:
    errors = tuple(CodingErrors("", 0.1, 0.1, 0.1, np.full((1, 1), x**2)) for x in output_errors)
    kl = tuple(x / 10 for x in output_errors)
    return Judged("polar", rotation, books, 3.25, 0, errors, kl)


def test_the_reading_follows_the_numbers() -> None:
    rows = [
        judged("hadamard", "analytic", 0.10, 0.12),
        judged("hadamard", "offline", 0.11, 0.132),
        judged("hadamard", "online", 0.09, 0.108),
        judged("none", "analytic", 0.44),
        judged("none", "offline", 0.22),
        judged("none", "online", 0.33),
    ]
    costs = [
        Cost("polar, analytic", 3.25, 10.0, 0.0, 1.0, 3.0),
        Cost("polar, offline", 3.25, 20.0, 0.0, 1.0, 3.0),
        Cost("polar, online", 3.25, 30.0, 10.0, 1.0, 5.0),
        Cost("KIVI-2", 3.0, 5.0, 0.0, 0.5, 1.5),
    ]
    first, second = read(rows, costs)
    # The same factor under both seeds: an interval of no width.
    assert "polar by offline x1.100 (1.100 to 1.100) and online x0.900 (0.900 to 0.900)" in first
    assert "KL offline x1.100" in first
    assert "x4.00 the output error" in first
    assert "(offline, x2.00) still loses to rotated analytic ones" in first
    assert "x2.0 the time of KIVI-2" in second and "x6.0 where they are fitted online" in second
    assert "token takes x2.0, x2.0 and x3.0" in second
    better = [*rows[:4], judged("none", "offline", 0.055), rows[5]]
    assert "(offline, x0.50) beats rotated analytic ones" in read(better, costs)[0]


def test_the_study_runs_without_a_model(
    tiny_capture: CaptureReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sphkv_cli.study.books.TIMED_TOKENS", 256)
    monkeypatch.setattr("sphkv_cli.study.books.time_books.__defaults__", (256,))
    result = run(StudyInputs(StudyOptions(max_queries=8), tiny_capture))
    quality, ratios, costs = result.tables
    assert len(quality.rows) == 2 * 2 * 3 + 2 and len(costs.rows) == 5
    assert len(ratios.rows) == 2 * 2 * 2
    assert {row[10] for row in quality.rows} == {None}  # no KL without a model
    by = {tuple(row[:3]): row for row in quality.rows}
    code = quality.rows[0][0]
    assert float(by[code, "hadamard", "analytic"][8]) < float(by["KIVI-2", "-", "-"][8])  # type: ignore[arg-type]
