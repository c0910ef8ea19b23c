"""A fit finds what was put into the capture, reads no judge document, and leaves whole files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.codebooks import CodebooksReader
from sphkv_cli.errors import ArtifactError, SphkvError, UsageError
from sphkv_cli.fit.options import FitOptions
from sphkv_cli.fit.stage import fit_codebooks
from sphkv_cli.fit.view import view
from sphkv_cli.render import plain
from sphkv_kernels.pages import region_bytes

FEW = ("4/2/2/2:fp16", "4/2/2/2:r2", "4/2/2/2/3")
"""Codes for head_dim 32."""


def biased(
    rng: np.random.Generator, kind: str, document: int, layer: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Gaussian vectors; keys around a mean of their head three times as long."""
    x = rng.standard_normal(shape)
    if kind == "keys":
        x += 3.0 * np.random.default_rng(layer).standard_normal(shape[1:])
    return x


@pytest.mark.parametrize(("head_dim", "rotation"), [(64, "hadamard"), (128, "haar")])
def test_measured_distortion_is_the_predicted_one_on_gaussian_vectors(
    make_capture: Callable[..., Path], tmp_path: Path, head_dim: int, rotation: str
) -> None:
    capture = make_capture(head_dim=head_dim, n_tokens=700, query_stride=25, n_layers=1)
    result = fit_codebooks(FitOptions(rotation=rotation), capture, tmp_path / "c.h5")
    assert len(result.tables.codes) == 8
    for row in result.tables.codes:
        # 1,400 vectors per code; the sampling error is below 1 %.
        assert row.key_distortion == pytest.approx(row.predicted_distortion, rel=0.02)
        assert row.value_distortion == pytest.approx(row.predicted_distortion, rel=0.02)
        # 28 queries of 4 heads: the norms of a few vectors carry more of the sampling error.
        assert row.isotropic_relative_logit_error == pytest.approx(
            row.predicted_relative_logit_error, rel=0.06
        )
    for level in result.tables.levels:
        if 1 <= level.level <= 4:
            assert level.key_angle_mse_rad2 == pytest.approx(
                level.predicted_angle_mse_rad2, rel=0.05
            )
    for good in result.tables.goodness:
        assert good.head_ks < 2.0 * good.sampling_ks


def test_shares_of_distortion_add_up_to_one(tiny_capture: Path, tmp_path: Path) -> None:
    result = fit_codebooks(FitOptions(codes=FEW), tiny_capture, tmp_path / "c.h5")
    for code in result.tables.codes:
        shares = [r.share_of_distortion for r in result.tables.levels if r.code == code.name]
        assert sum(shares) == pytest.approx(1.0, abs=1e-12)
        assert min(shares) >= 0


def test_centring_lowers_the_distortion_of_biased_keys(
    make_capture: Callable[..., Path], tmp_path: Path
) -> None:
    capture = make_capture(draw=biased, n_tokens=300)
    plain_fit = fit_codebooks(FitOptions(codes=FEW, centring="none"), capture, tmp_path / "none.h5")
    centred = fit_codebooks(FitOptions(codes=FEW), capture, tmp_path / "post.h5")
    for before, after in zip(plain_fit.tables.codes, centred.tables.codes, strict=True):
        # The mean carries nine tenths of the energy of a key.
        assert after.raw_key_distortion < 0.2 * before.raw_key_distortion
        assert after.relative_logit_error < 0.5 * before.relative_logit_error
        assert after.value_distortion == before.value_distortion
    assert any("of its energy" in sentence for sentence in centred.reading)
    assert CodebooksReader.open(tmp_path / "none.h5").frames.key_mean is None


def test_kept_energy_is_what_centring_leaves(
    make_capture: Callable[..., Path], tmp_path: Path
) -> None:
    capture = make_capture(draw=biased, n_tokens=129)
    fit_codebooks(FitOptions(codes=FEW[:1]), capture, tmp_path / "c.h5")
    fitted = CodebooksReader.open(tmp_path / "c.h5")
    assert fitted.frames.key_mean is not None
    with CaptureReader(capture) as reader:
        keys = np.stack([reader.keys(2, layer) for layer in range(2)]).astype(np.float64)
    left = ((keys - fitted.frames.key_mean[:, None]) ** 2).sum(axis=(1, 3))
    expected = left / (keys**2).sum(axis=(1, 3))
    assert fitted.measured["kept_key_energy"] == pytest.approx(expected, rel=1e-5)


def test_tiers_may_pair_a_finer_key_code_with_a_coarser_value_code(
    tiny_capture: Path, tmp_path: Path
) -> None:
    codes = ("fine=4/2/2/2/3", "mid=3/1/1/1:r2", "low=2/1/1:r1")
    tiers = ("fine/low", "mid", "fine", "fine/mid", "low")
    result = fit_codebooks(FitOptions(codes=codes, tiers=tiers), tiny_capture, tmp_path / "c.h5")
    assert result.tiers == ("low", "mid", "fine/low", "fine/mid", "fine")
    read = {tier.name: tier for tier in CodebooksReader.open(tmp_path / "c.h5").tiers}
    assert list(read) == list(result.tiers)
    assert read["fine/low"].key_code is not None
    assert read["fine/low"].value_code is not None
    assert (read["fine/low"].key_code.name, read["fine/low"].value_code.name) == ("fine", "low")


@pytest.mark.parametrize(
    ("tiers", "says"),
    [
        (("fine/none",), "'none'"),
        (("low",), "'low'"),
        (("fine", "fine/fine"), "twice"),
        (("",), "''"),
    ],
)
def test_tiers_of_unknown_codes_are_refused(
    tiny_capture: Path, tmp_path: Path, tiers: tuple[str, ...], says: str
) -> None:
    options = FitOptions(codes=("fine=4/2/2/2/3",), tiers=tiers)
    with pytest.raises(UsageError, match=says):
        fit_codebooks(options, tiny_capture, tmp_path / "c.h5")


def test_means_are_those_of_the_fit_documents_alone(
    make_capture: Callable[..., Path], tmp_path: Path
) -> None:
    def draw(
        rng: np.random.Generator, kind: str, document: int, layer: int, shape: tuple[int, ...]
    ) -> np.ndarray:
        return rng.standard_normal(shape) + (100.0 if document == 2 else 0.0)

    capture = make_capture(draw=draw)
    fit_codebooks(FitOptions(codes=FEW, centring="post_rope"), capture, tmp_path / "c.h5")
    mean = CodebooksReader.open(tmp_path / "c.h5").frames.key_mean
    assert mean is not None
    with CaptureReader(capture) as reader:
        for layer in range(reader.n_layers):
            keys = np.concatenate([reader.keys(document, layer) for document in (0, 1)])
            expected = keys.mean(axis=0, dtype=np.float64)
            assert mean[layer] == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_judge_documents_are_not_read(make_capture: Callable[..., Path], tmp_path: Path) -> None:
    def poisoned(
        rng: np.random.Generator, kind: str, document: int, layer: int, shape: tuple[int, ...]
    ) -> np.ndarray:
        x = rng.standard_normal(shape)
        return np.full(shape, np.nan) if document == 3 else x

    clean = fit_codebooks(FitOptions(codes=FEW), make_capture("a.h5"), tmp_path / "a_out.h5")
    found = fit_codebooks(
        FitOptions(codes=FEW), make_capture("b.h5", draw=poisoned), tmp_path / "b_out.h5"
    )
    assert found.tables.codes == clean.tables.codes
    assert found.tables.goodness == clean.tables.goodness


def test_empirical_books_are_never_worse_on_their_own_data(
    make_capture: Callable[..., Path], tmp_path: Path
) -> None:
    def stretched(
        rng: np.random.Generator, kind: str, document: int, layer: int, shape: tuple[int, ...]
    ) -> np.ndarray:
        # The same vectors in `fit` and `select`, far from isotropic without a rotation.
        same = np.random.default_rng((layer, len(kind)))
        widest = 30.0 if kind == "keys" else 0.03  # first to last: books of keys harm values
        return same.standard_normal(shape) * np.geomspace(1.0, widest, shape[-1])

    capture = make_capture(draw=stretched, splits=("fit", "select", "judge"), n_tokens=400)
    options = FitOptions(codes=FEW, rotation="none", centring="none", density="empirical")
    result = fit_codebooks(options, capture, tmp_path / "c.h5")
    for row in result.tables.empirical:
        assert row.empirical_key_distortion < row.key_distortion
        assert row.empirical_value_distortion < row.value_distortion
    assert any(sentence.startswith("Empirical books help:") for sentence in result.reading)


def test_empirical_books_that_do_not_help_are_said_not_to(
    make_capture: Callable[..., Path], tmp_path: Path
) -> None:
    capture = make_capture(n_tokens=600, query_stride=50, n_layers=1)
    options = FitOptions(codes=FEW, density="empirical")
    result = fit_codebooks(options, capture, tmp_path / "c.h5")
    assert any("do not help" in sentence for sentence in result.reading)
    assert CodebooksReader.open(tmp_path / "c.h5").empirical is not None


def test_the_digest_is_that_of_the_content(tiny_capture: Path, tmp_path: Path) -> None:
    first = fit_codebooks(FitOptions(codes=FEW), tiny_capture, tmp_path / "one.h5")
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1 if n_threads > 1 else 2)
    try:
        again = fit_codebooks(FitOptions(codes=FEW), tiny_capture, tmp_path / "two.h5")
    finally:
        torch.set_num_threads(n_threads)
    other_seed = fit_codebooks(FitOptions(codes=FEW, seed=43), tiny_capture, tmp_path / "three.h5")
    assert again.digest == first.digest == CodebooksReader.open(tmp_path / "one.h5").digest
    assert other_seed.digest != first.digest
    assert other_seed.rotation_digest != first.rotation_digest


def test_long_documents_are_read_in_chunks_and_give_the_same(
    tiny_capture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = FitOptions(codes=FEW, centring="post_rope", balancing="none")
    whole = fit_codebooks(options, tiny_capture, tmp_path / "whole.h5")
    longest = 0
    read = CaptureReader.keys

    def spy(self: CaptureReader, document: object, layer: int, tokens: slice) -> np.ndarray:
        nonlocal longest
        found = read(self, document, layer, tokens)
        longest = max(longest, len(found))
        return found

    monkeypatch.setattr(CaptureReader, "keys", spy)
    monkeypatch.setattr("sphkv_cli.fit.captured_vectors.TOKENS_PER_CHUNK", 16)
    # Frames are chosen on the first tokens of a document, all at once.
    monkeypatch.setattr("sphkv_cli.fit.frame_error.MAX_TOKENS", 16)
    parts = fit_codebooks(options, tiny_capture, tmp_path / "parts.h5")
    assert longest == 16
    for a, b in zip(whole.tables.codes, parts.tables.codes, strict=True):
        assert b.key_distortion == pytest.approx(a.key_distortion, rel=1e-5)
        assert b.relative_logit_error == pytest.approx(a.relative_logit_error, rel=1e-5)
    assert [g.worst_ks for g in parts.tables.goodness] == pytest.approx(
        [g.worst_ks for g in whole.tables.goodness], abs=1e-3
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("kind", "head"), [("keys", 1), ("values", 0), ("queries", 3)])
def test_values_that_are_no_numbers_are_named_with_layer_and_head(
    make_capture: Callable[..., Path], tmp_path: Path, kind: str, head: int, value: float
) -> None:
    def broken(
        rng: np.random.Generator, drawn: str, document: int, layer: int, shape: tuple[int, ...]
    ) -> np.ndarray:
        x = rng.standard_normal(shape)
        if (drawn, document, layer) == (kind, 2, 1):
            x[17, head, 5] = value
        return x

    output = tmp_path / "c.h5"
    output.write_bytes(b"an older result")
    with pytest.raises(SphkvError) as caught:
        fit_codebooks(FitOptions(codes=FEW), make_capture(draw=broken), output, force=True)
    name = "NaN" if np.isnan(value) else "Inf"
    assert f"{name} among the {kind} of layer 1, head {head}" in caught.value.message
    assert "text#2" in caught.value.message
    assert output.read_bytes() == b"an older result"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.h5", "capture.h5"]


@pytest.mark.parametrize("scale", [1e6, 5e37])
def test_vectors_beyond_float16_radii_are_an_error_not_a_saturation(
    make_capture: Callable[..., Path], tmp_path: Path, scale: float
) -> None:
    def huge(
        rng: np.random.Generator, kind: str, document: int, layer: int, shape: tuple[int, ...]
    ) -> np.ndarray:
        return rng.standard_normal(shape) * (scale if layer == 1 else 1.0)

    with pytest.raises(SphkvError, match="layer 1"):
        fit_codebooks(FitOptions(codes=FEW), make_capture(draw=huge), tmp_path / "c.h5")


def test_nothing_is_overwritten_without_force(tiny_capture: Path, tmp_path: Path) -> None:
    output = tmp_path / "c.h5"
    fit_codebooks(FitOptions(codes=FEW[:1]), tiny_capture, output)
    before = output.read_bytes()
    with pytest.raises(ArtifactError, match=r"exists.*--force"):
        fit_codebooks(FitOptions(codes=FEW), tiny_capture, output)
    assert output.read_bytes() == before
    fit_codebooks(FitOptions(codes=FEW), tiny_capture, output, force=True)
    assert len(CodebooksReader.open(output).codes) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["c.h5"]


def test_laid_out_rates_are_those_of_the_pages(tiny_capture: Path, tmp_path: Path) -> None:
    result = fit_codebooks(FitOptions(codes=FEW), tiny_capture, tmp_path / "c.h5")
    for row, code in zip(
        result.tables.codes, CodebooksReader.open(tmp_path / "c.h5").codes, strict=True
    ):
        expected = [8 * region_bytes(code, 32, size) / (32 * size) for size in (16, 32, 64)]
        assert list(row.laid_out_rates) == expected
        assert min(expected) >= row.code_rate


def test_a_sliding_window_limits_what_queries_see(
    make_capture: Callable[..., Path], tmp_path: Path
) -> None:
    # Keys are long outside the window of the queries, which all stand at the end.
    def draw(
        rng: np.random.Generator, kind: str, document: int, layer: int, shape: tuple[int, ...]
    ) -> np.ndarray:
        x = rng.standard_normal(shape)
        if kind == "keys":
            x[:32] *= 50.0
        return x

    options = FitOptions(codes=FEW[:1], centring="none")
    stride = {"query_stride": 64, "n_tokens": 65}  # queries at 0 and 64
    wide = fit_codebooks(options, make_capture("w.h5", draw=draw, **stride), tmp_path / "1.h5")
    narrow = fit_codebooks(
        options, make_capture("n.h5", draw=draw, window=8, **stride), tmp_path / "2.h5"
    )
    assert wide.tables.codes[0].key_distortion == narrow.tables.codes[0].key_distortion
    assert wide.tables.codes[0].relative_logit_error != narrow.tables.codes[0].relative_logit_error


def test_the_worst_head_is_found(make_capture: Callable[..., Path], tmp_path: Path) -> None:
    # Without a rotation, a head with all its energy on one axis of each pair is coded worst.
    def draw(
        rng: np.random.Generator, kind: str, document: int, layer: int, shape: tuple[int, ...]
    ) -> np.ndarray:
        x = rng.standard_normal(shape)
        if layer == 1 and kind == "values":
            x[:, 1, 1:] *= 0.02  # angles far from their density
        return x

    result = fit_codebooks(
        FitOptions(codes=("3/1/1/1:r1",), rotation="none"),
        make_capture(draw=draw),
        tmp_path / "c.h5",
    )
    row = result.tables.codes[0]
    assert (row.worst_value_layer, row.worst_value_head) == (1, 1)
    assert row.worst_value_distortion > 2 * row.predicted_distortion
    furthest = max(
        (g for g in result.tables.goodness if g.vectors == "values"), key=lambda g: g.worst_ks
    )
    assert (furthest.worst_layer, furthest.worst_head) == (1, 1)


def test_the_paper_code_is_beaten_and_it_says_so(
    make_capture: Callable[..., Path], tmp_path: Path
) -> None:
    capture = make_capture(head_dim=64, n_layers=1, query_stride=10)
    result = fit_codebooks(FitOptions(), capture, tmp_path / "c.h5")
    assert any(s.startswith("paper-4222 is beaten by polar-4333-r3") for s in result.reading)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rotation": "gaussian"}, "gaussian"),
        ({"centring": "in_rope"}, "in_rope"),
        ({"balancing": "some"}, "some"),
        ({"rope_pairs": 0}, "rope-pairs is 0"),
        ({"rope_pairs": 4, "centring": "none"}, "--rope-pairs has no meaning with --centring none"),
        ({"density": "kernel"}, "kernel"),
        ({"seed": -1}, "-1"),
        ({"page_sizes": (48,)}, "48"),
        ({"page_sizes": ()}, "page sizes"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        FitOptions(**change)


def test_a_head_has_no_more_rope_pairs_than_half_its_coordinates(
    make_capture: Callable[..., Path], tmp_path: Path
) -> None:
    capture = make_capture(head_dim=16, n_layers=1)
    said = "--rope-pairs is 9, a head of 16 has 8; give 8 or fewer, or auto"
    with pytest.raises(UsageError, match=said):
        fit_codebooks(FitOptions(rope_pairs=9), capture, tmp_path / "c.h5")
    assert not (tmp_path / "c.h5").exists()


@pytest.mark.parametrize("code", ["4/2/2/2/2/2", "4/2/2:norm", "1/2+unbiased", "4/2:e9m9"])
def test_a_code_that_does_not_fit_the_model_leaves_nothing(
    tiny_capture: Path, tmp_path: Path, code: str
) -> None:
    with pytest.raises(UsageError):
        fit_codebooks(FitOptions(codes=(code,)), tiny_capture, tmp_path / "c.h5")
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_layer(tiny_capture: Path, tmp_path: Path) -> None:
    calls: list[tuple[object, ...]] = []

    class Recorder:
        def start(self, description: str, total: float | None, unit: str) -> None:
            calls.append(("start", total, unit))

        def advance(self, amount: float = 1.0) -> None:
            calls.append(("advance", amount))

        def finish(self) -> None:
            calls.append(("finish",))

    fit_codebooks(FitOptions(codes=FEW[:1]), tiny_capture, tmp_path / "c.h5", progress=Recorder())
    phase = [("start", 2, "layers"), ("advance", 1.0), ("advance", 1.0), ("finish",)]
    assert calls == phase * 2


def test_the_result_can_be_shown_and_be_json(tiny_capture: Path, tmp_path: Path) -> None:
    options = FitOptions(codes=FEW, density="empirical")
    result = fit_codebooks(options, tiny_capture, tmp_path / "c.h5")
    assert len(view(result)) > 6
    assert plain(result)["tables"]["codes"][0]["name"] == result.tiers[0]
