"""`allocate` end to end on a synthetic capture: laws of the plan, the chain and bad input."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from sphkv_cli.allocation.context import read_context, split_document
from sphkv_cli.allocation.estimator_store import stored_estimator
from sphkv_cli.allocation.options import AllocateOptions
from sphkv_cli.allocation.page_costs import order_by_score, page_of_token
from sphkv_cli.allocation.stage import allocate
from sphkv_cli.allocation.view import view
from sphkv_cli.artifacts.allocation import AllocationReader
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.capture_writer import write_fisher
from sphkv_cli.artifacts.store import content_digest, verify_digest
from sphkv_cli.blocks import Line, Table
from sphkv_cli.errors import ArtifactError, SphkvError, UsageError
from sphkv_kernels.cache_builder import build_cache
from sphkv_kernels.page_slots import SequenceTokens

from .conftest import OPTIONS, Chain


def planned(path: Path) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    with AllocationReader(path) as reader:
        return [
            (
                reader.tier_of_token(document),
                reader.page_of_token(document),
                reader.policy_tier_of_token(document),
            )
            for document in reader.documents
        ]


def test_plans_and_policies_hold_their_budget(allocation) -> None:
    result, _ = allocation
    for plan in (*result.summary.plans, *result.summary.checks):
        assert plan.laid_out.total <= plan.budget_bytes
        assert all(row.laid_out_bytes <= plan.budget_bytes for row in plan.baselines)
        assert plan.budget_bits_per_coordinate == pytest.approx(5.0, abs=1e-3)
        assert plan.laid_out_rate == pytest.approx(5.0, abs=0.1)
        assert plan.dual_bound <= plan.cost * (1 + 1e-12)
        # Forty pages a document: within a page of the bound.
        assert plan.gap < 0.05
        assert sum(plan.tier_mix) == pytest.approx(1.0)


def test_the_plan_is_no_worse_than_any_baseline(allocation) -> None:
    result, _ = allocation
    for plan in (*result.summary.plans, *result.summary.checks):
        names = [row.name for row in plan.baselines]
        assert names[:3] == ["policy", "uniform", "uniform + sink page"]
        # Predicted cost is what the solver minimises, per page; baselines page by position.
        assert all(row.times_plan >= 0.99 for row in plan.baselines)
        assert (names[3:] == ["drops at their sum", "drops at 8x their sum"]) == (
            plan in result.summary.checks
        )


def test_the_plan_beats_one_tier_for_all_in_measured_error(allocation) -> None:
    # Heavy tokens and a sink: what an allocator is for. By far, or something is broken.
    result, _ = allocation
    for check in result.summary.checks:
        uniform = next(row for row in check.baselines if row.name == "uniform")
        assert check.measured is not None
        assert uniform.measured is not None
        assert uniform.measured > 1.5 * check.measured


def test_predictions_agree_with_measured_errors(allocation) -> None:
    result, _ = allocation
    assert result.summary.check_split == "select"
    assert [row.layer for row in result.summary.agreement] == [0, 1]
    for row in result.summary.agreement:
        assert row.error_log_correlation > 0.95
        # First order at few bits on peaked attention: right to a small factor.
        assert 0.25 < row.error_ratio < 4
        assert row.future_log_correlation > 0.3
        # Fitted on other documents: what coded tokens cost is known to a small factor.
        assert 0.25 < row.code_coherence / row.code_coefficient < 4


def test_the_pages_of_the_artifact_build_a_cache_of_its_bytes(allocation, chain: Chain) -> None:
    _, path = allocation
    with AllocationReader(path) as reader, CaptureReader(chain.capture) as capture:
        reader.require_capture(capture.ref)
        for document in reader.documents:
            tiers, pages = reader.tier_of_token(document), reader.page_of_token(document)
            n, total = document.n_context, document.fixed_table_bytes
            for layer in range(capture.n_layers):
                keys = torch.from_numpy(capture.keys(document.index, layer)[:n])
                values = torch.from_numpy(capture.values(document.index, layer)[:n])
                sequence = SequenceTokens(
                    reader.frames.keys_to_frame(layer, keys),
                    reader.frames.values_to_frame(values),
                    torch.from_numpy(np.ascontiguousarray(tiers[layer].T)),
                    torch.from_numpy(np.ascontiguousarray(pages[layer].T)),
                )
                cache = build_cache(reader.tiers, reader.page_size, [sequence])
                total += cache.pool.numel() + cache.page_table.n_bytes
            assert total == document.laid_out_bytes <= document.budget_bytes


def test_the_artifact_says_what_it_is(allocation, chain: Chain) -> None:
    result, path = allocation
    assert verify_digest(path)
    with AllocationReader(path) as reader, CaptureReader(chain.capture) as capture:
        info = reader.info
        assert reader.digest == result.digest
        assert set(reader.header.inputs) == {"capture", "codebooks"}
        assert (info.model_digest, info.n_layers, info.head_dim) == (capture.model_digest, 2, 32)
        assert (info.page_size, info.horizon, info.window, info.budget) == (16, 48, 32, "5b")
        assert info.utility["name"] == "combination"
        assert (reader.drop_coefficients >= 1).all()
        assert np.log(info.drop_coefficient) == pytest.approx(
            np.log(reader.drop_coefficients).mean()
        )
        low, high = result.summary.drop_coefficient_range
        assert (low, high) == (reader.drop_coefficients.min(), reader.drop_coefficients.max())
        assert reader.layers == capture.layers
        assert info.rope == capture.rope
        assert [tier.name for tier in reader.tiers][-2:] == ["int8", "dense"]
        assert len(reader.tiers) == 4
        np.testing.assert_allclose(reader.quotas.sum(axis=-1), 1.0)
        np.testing.assert_allclose(reader.head_weights, capture.output_weight)
        assert reader.calibration is not None
        assert [d.split for d in reader.documents] == ["judge"]
        for document in reader.documents:
            source = capture.documents[document.index]
            assert (source.name, source.text_sha256) == (document.name, document.text_sha256)
            assert document.n_context == source.n_tokens - 48
            assert set(np.unique(reader.tier_of_token(document))) <= set(range(-1, 4))
    with h5py.File(path) as file:
        axes = {}
        file.visititems(lambda name, item: axes.update({name: item.attrs.get("axes")}))
        missing = [
            name
            for name, value in axes.items()
            if isinstance(file[name], h5py.Dataset) and value is None
        ]
        assert not missing


def test_judge_plans_do_not_depend_on_their_future(
    chain: Chain, allocation, tmp_path: Path
) -> None:
    _, path = allocation
    changed = Chain(tmp_path / "capture.h5", tmp_path / "codebooks.h5")
    shutil.copy(chain.capture, changed.capture)
    shutil.copy(chain.codebooks, changed.codebooks)
    with h5py.File(changed.capture, "r+") as file:
        (judge,) = (g for g in file["documents"].values() if g.attrs["split"] == "judge")
        for layer in judge["layers"].values():
            layer["keys"][145:] = layer["keys"][145:][::-1]
            layer["values"][145:] = layer["values"][145:][::-1]
            late = judge["query_positions"][()] >= 145
            queries = layer["queries"][()]
            queries[late] = queries[late][::-1]
            layer["queries"][...] = queries
        relink(file, changed.codebooks)
    again = tmp_path / "allocation.h5"
    allocate(OPTIONS, changed.capture, changed.codebooks, again)
    for one, other in zip(planned(path), planned(again), strict=True):
        for mine, theirs in zip(one, other, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def relink(capture: h5py.File, codebooks: Path) -> None:
    """Recompute the digest of an edited capture, and let the codebooks name it."""
    old = capture.attrs["digest"]
    capture.attrs["digest"] = content_digest(capture)
    with h5py.File(codebooks, "r+") as file:
        file.attrs["inputs"] = file.attrs["inputs"].replace(old, capture.attrs["digest"])
        file.attrs["digest"] = content_digest(file)


def test_the_same_inputs_give_the_same_digest(allocation, chain: Chain, tmp_path: Path) -> None:
    result, _ = allocation
    output = tmp_path / "again.h5"
    assert allocate(OPTIONS, chain.capture, chain.codebooks, output).digest == result.digest
    with pytest.raises(ArtifactError, match=r"again.h5 exists; pass --force"):
        allocate(OPTIONS, chain.capture, chain.codebooks, output)
    fewer = replace(OPTIONS, tiers=("dense", "int8"), plan_select=True)
    forced = allocate(fewer, chain.capture, chain.codebooks, output, force=True)
    assert forced.digest != result.digest
    assert forced.summary.options == ("drop", "int8", "dense")
    assert [plan.split for plan in forced.summary.plans] == ["judge", "select"]
    assert forced.summary.plans[1].measured is None


@pytest.mark.parametrize(
    "changes",
    [
        {"utility": "recency"},
        {"utility": "oracle"},
        {"utility": "window"},
        {"utility": "window", "calibrate": False},
        {"head_weights": "none"},
        {"drop_coefficient": 1.0},
        {"code_coefficient": 1.0},
    ],
    ids=str,
)
def test_controls_run_and_say_what_they_are(
    changes: dict, allocation, chain: Chain, tmp_path: Path
) -> None:
    default, _ = allocation
    output = tmp_path / "control.h5"
    result = allocate(replace(OPTIONS, **changes), chain.capture, chain.codebooks, output)
    assert result.digest != default.digest
    summary = result.summary
    assert summary.utility_is_ceiling == (changes.get("utility") == "oracle")
    is_raw = "calibrate" in changes or summary.utility_is_ceiling
    assert summary.is_calibrated != is_raw
    with AllocationReader(output) as reader:
        assert (reader.calibration is None) == is_raw
    best = summary.checks[0].measured
    reference = default.summary.checks[0].measured
    assert best is not None
    assert reference is not None
    if changes.get("utility") == "oracle":
        assert "ceiling" in summary.reading[0]
        assert best < 1.05 * reference
    if changes.get("utility") == "recency":
        assert best > 1.5 * reference


def test_a_budget_below_every_uniform_tier_says_so(chain: Chain, tmp_path: Path) -> None:
    low = replace(OPTIONS, budget="4b", tiers=("int8", "dense"))
    result = allocate(low, chain.capture, chain.codebooks, tmp_path / "a.h5")
    assert any("No uniform tier fits this budget" in said for said in result.summary.reading)


def test_plans_that_cost_the_same_are_said_to_tie(chain: Chain, tmp_path: Path) -> None:
    whole = replace(OPTIONS, budget="100%")
    result = allocate(whole, chain.capture, chain.codebooks, tmp_path / "a.h5")
    assert any(
        said.startswith("Measured on 1 select document, the plan's output error ties with that of")
        for said in result.summary.reading
    )
    assert not any(" 1x " in said for said in result.summary.reading if "Measured on" in said)


def test_fisher_weights_are_used_where_they_were_captured(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(SphkvError, match="holds no Fisher weights; capture with --fisher"):
        wanted = replace(OPTIONS, head_weights="fisher")
        allocate(wanted, chain.capture, chain.codebooks, tmp_path / "a.h5")
    changed = Chain(tmp_path / "capture.h5", tmp_path / "codebooks.h5")
    shutil.copy(chain.capture, changed.capture)
    shutil.copy(chain.codebooks, changed.codebooks)
    fisher = np.array([[1.0, 2.0, 3.0, 0.0], [0.5, 0.25, 8.0, 1.0]])
    with h5py.File(changed.capture, "r+") as file:
        write_fisher(file, fisher, fisher / 10, n_passes=4)
        relink(file, changed.codebooks)
    result = allocate(OPTIONS, changed.capture, changed.codebooks, tmp_path / "a.h5")
    assert result.summary.weights.startswith("Fisher")
    assert "10 %" in result.summary.weights
    with AllocationReader(tmp_path / "a.h5") as reader:
        np.testing.assert_array_equal(reader.head_weights, fisher)


def test_the_stored_score_is_the_one_that_ordered_the_pages(allocation, chain: Chain) -> None:
    _, path = allocation
    with AllocationReader(path) as reader, CaptureReader(chain.capture) as capture:
        estimator = stored_estimator(reader)
        (document,) = reader.documents
        pages = reader.page_of_token(document)
        info = capture.documents[document.index]
        split = split_document(capture, info, horizon=48, window=32)
        for layer in range(capture.n_layers):
            weights = torch.from_numpy(reader.head_weights[layer])
            context = read_context(capture, info, layer, split, reader.frames, weights)
            order = order_by_score(estimator.score(context).numpy()[None])
            np.testing.assert_array_equal(page_of_token(order, 16)[0], pages[layer])


def test_a_score_without_its_arrays_is_named(allocation, tmp_path: Path) -> None:
    _, path = allocation
    broken = tmp_path / "a.h5"
    shutil.copy(path, broken)
    with h5py.File(broken, "r+") as file:
        del file["score/weights"]
    with (
        AllocationReader(broken) as reader,
        pytest.raises(ArtifactError, match="no usable score 'combination'"),
    ):
        stored_estimator(reader)


def test_a_capture_without_select_documents_checks_on_fit(chain: Chain, tmp_path: Path) -> None:
    changed = Chain(tmp_path / "capture.h5", tmp_path / "codebooks.h5")
    shutil.copy(chain.capture, changed.capture)
    shutil.copy(chain.codebooks, changed.codebooks)
    with h5py.File(changed.capture, "r+") as file:
        for group in file["documents"].values():
            if group.attrs["split"] == "select":
                group.attrs["split"] = "fit"
        relink(file, changed.codebooks)
    result = allocate(OPTIONS, changed.capture, changed.codebooks, tmp_path / "a.h5")
    assert result.summary.check_split == "fit"
    assert {check.split for check in result.summary.checks} == {"fit"}


def test_a_sliding_window_frees_what_nobody_can_see(chain: Chain, tmp_path: Path) -> None:
    changed = Chain(tmp_path / "capture.h5", tmp_path / "codebooks.h5")
    shutil.copy(chain.capture, changed.capture)
    shutil.copy(chain.codebooks, changed.codebooks)
    with h5py.File(changed.capture, "r+") as file:
        table = file["layers"][()]
        table["window"][1] = 40
        file["layers"][...] = table
        relink(file, changed.codebooks)
    output = tmp_path / "a.h5"
    result = allocate(OPTIONS, changed.capture, changed.codebooks, output)
    # Positions are laid out where a window needs them, and paid for.
    assert all(plan.laid_out.positions > 0 for plan in result.summary.plans)
    assert all(plan.laid_out.total <= plan.budget_bytes for plan in result.summary.plans)
    with AllocationReader(output) as reader:
        (document,) = reader.documents
        tiers, pages = reader.tier_of_token(document), reader.page_of_token(document)
    # The first query after the context, at 145, sees tokens 106 and later: 39 of them, on the
    # first three pages by score. What lies on later pages nobody will ask for.
    assert np.all(pages[1][:, 106:] < 3)
    assert np.all(tiers[1][pages[1] >= 3] == -1)


def test_view_shows_verdicts_bytes_and_every_layer(allocation) -> None:
    result, _ = allocation
    blocks = view(result)
    text = "\n".join(block.text for block in blocks if isinstance(block, Line))
    for sentence in result.summary.reading:
        assert sentence in text
    for words in ("5 bits per coordinate", "% of bf16", " bytes", result.digest, "drop coeff"):
        assert words in text
    tables = {block.title: block for block in blocks if isinstance(block, Table)}
    assert any(title.startswith("Laid-out bytes") for title in tables)
    (layers,) = (table for title, table in tables.items() if title.startswith("Layers"))
    assert [row[0] for row in layers.rows] == [0, 1]


# --- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": "-3b"}, "negative"),
        ({"budget": "3"}, "no unit"),
        ({"page_size": 24}, "page size is 24; choose one of 16, 32, 64"),
        ({"horizon": 0}, "horizon is 0"),
        ({"window": 0}, "window is 0"),
        ({"utility": "magic"}, "'magic' is not known"),
        ({"drop_coefficient": 0.0}, "drop coefficient is 0.0"),
        ({"drop_coefficient": float("nan")}, "drop coefficient is nan"),
        ({"code_coefficient": -1.0}, "code coefficient is -1.0; give --code-coefficient above 0"),
        ({"head_weights": "magic"}, "'magic' are not known; choose auto, fisher"),
        ({"utility": "recency", "calibrate": False}, "'recency' is no damage"),
        ({"seed": -1}, "seed is -1"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_at_once(changes: dict, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        AllocateOptions(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": "0.1b"}, "of document .* is below its metadata, .* give at least"),
        ({"budget": "20b"}, "is above its dense cache, .* give at most"),
        ({"budget": "1GiB"}, "above its dense cache"),
        ({"tiers": ("dense", "fp4")}, r"'fp4' is not known; .*dense \(drop is always\)$"),
        ({"tiers": ("fp4",), "no_drop": True}, "'fp4' is not known; choose among .*dense$"),
        ({"horizon": 170}, "193 tokens; horizon 170 and window 32 need 202"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_capture_is_refused(
    changes: dict, words: str, chain: Chain, tmp_path: Path
) -> None:
    output = tmp_path / "a.h5"
    with pytest.raises(UsageError, match=words) as caught:
        allocate(replace(OPTIONS, **changes), chain.capture, chain.codebooks, output)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_codebooks_of_another_capture_are_refused(
    chain: Chain, other_chain: Chain, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="fit-codebooks"):
        allocate(OPTIONS, chain.capture, other_chain.codebooks, tmp_path / "a.h5")
    with pytest.raises(ArtifactError, match="codebooks"):
        allocate(OPTIONS, chain.codebooks, chain.codebooks, tmp_path / "a.h5")
    with pytest.raises(ArtifactError, match="does not exist"):
        allocate(OPTIONS, chain.capture, tmp_path / "no.h5", tmp_path / "a.h5")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["keys", "queries"])
def test_not_finite_activations_are_named(
    poison: float, kind: str, chain: Chain, tmp_path: Path
) -> None:
    changed = Chain(tmp_path / "capture.h5", tmp_path / "codebooks.h5")
    shutil.copy(chain.capture, changed.capture)
    shutil.copy(chain.codebooks, changed.codebooks)
    with h5py.File(changed.capture, "r+") as file:
        vectors = file[f"documents/000/layers/01/{kind}"]
        bits = np.float32(poison).view(np.uint32) >> 16
        vectors[5, 1, 3] = bits
        relink(file, changed.codebooks)
    output = tmp_path / "a.h5"
    with pytest.raises(SphkvError, match=f"among the {kind} of layer 1, head 1"):
        allocate(OPTIONS, changed.capture, changed.codebooks, output)
    assert not output.exists()


@pytest.mark.parametrize("split", ["fit", "judge"])
def test_a_split_without_documents_is_refused(split: str, chain: Chain, tmp_path: Path) -> None:
    changed = Chain(tmp_path / "capture.h5", tmp_path / "codebooks.h5")
    shutil.copy(chain.capture, changed.capture)
    shutil.copy(chain.codebooks, changed.codebooks)
    with h5py.File(changed.capture, "r+") as file:
        for group in file["documents"].values():
            if group.attrs["split"] == split:
                group.attrs["split"] = "select"
        relink(file, changed.codebooks)
    with pytest.raises(SphkvError, match=f"no document of the split '{split}'"):
        allocate(OPTIONS, changed.capture, changed.codebooks, tmp_path / "a.h5")
