"""The stage as a whole: what it measures is what the artifacts say, by another way."""

import itertools
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sphkv_cli.allocation.layout import fixed_table_bytes
from sphkv_cli.artifacts.allocation import AllocationReader, PlanInfo
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.report import Report
from sphkv_cli.errors import EnvironmentUnable, GateFailed, UsageError
from sphkv_cli.profile import stage
from sphkv_cli.profile.candidates import Candidate, lay_out, placement, read_plans
from sphkv_cli.profile.decoders import Decoded, ReferenceDecoder
from sphkv_cli.profile.gates import check_gates, require_gates
from sphkv_cli.profile.laid_out import cache_terms, uniform_terms
from sphkv_cli.profile.layer_inputs import LayerInputs, horizon_rows, read_layer
from sphkv_cli.profile.options import Gates, ProfileOptions
from sphkv_cli.profile.result import HeadErrors, ProfileReport, SpeedReport, SpeedRow
from sphkv_cli.profile.stage import profile
from sphkv_cli.profile.view import view
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.vectors import decode_vectors, encode_vectors

from .conftest import Run

REFERENCE = ProfileOptions(backend="reference")


LAYER, HEAD, KV_HEAD = 1, 3, 1


def by_hand(
    capture: CaptureReader, allocation: AllocationReader, info: PlanInfo
) -> tuple[list[float], list[float], list[float], list[torch.Tensor]]:
    """KL, ||o_hat - o||^2, ||o||^2 and logit errors per query of one head, without pages, merges or
    the frame: decoded keys are turned back and meet the captured queries."""
    n = info.n_context
    tier = allocation.tier_of_token(info)[LAYER, KV_HEAD]
    keys = torch.from_numpy(capture.keys(info.index, LAYER))
    values = torch.from_numpy(capture.values(info.index, LAYER))
    framed = allocation.frames.keys_to_frame(LAYER, keys[:n])[:, KV_HEAD]
    framed_values = allocation.frames.values_to_frame(values[:n])[:, KV_HEAD]
    k, v = keys[:, KV_HEAD].double(), values[:, KV_HEAD].double()
    k_hat, v_hat = k.clone(), v.clone()
    for index, form in enumerate(allocation.tiers):
        rows = np.flatnonzero(tier == index)
        decoded = torch.zeros((rows.size, 2, 64), dtype=torch.float64)
        stored = encode_vectors(form.key_format, framed[rows])
        decoded[:, KV_HEAD] = decode_vectors(form.key_format, stored)
        k_hat[rows] = allocation.frames.keys_from_frame(LAYER, decoded)[:, KV_HEAD]
        stored = encode_vectors(form.value_format, framed_values[rows])
        v_hat[rows] = allocation.frames.output_from_frame(decode_vectors(form.value_format, stored))
    scale = capture.layers[LAYER].softmax_scale
    positions = capture.query_positions(info.index)
    queries = torch.from_numpy(capture.queries(info.index, LAYER))[positions >= n, HEAD].double()
    coded_tokens = np.flatnonzero(tier >= 0)
    kept = np.concatenate([coded_tokens, np.arange(n, k.shape[0])])
    kls, errors, norms, differences = [], [], [], []
    for q, position in zip(queries, positions[positions >= n], strict=True):
        tokens = torch.from_numpy(kept[kept <= position])
        dense = torch.softmax(scale * (k[: position + 1] @ q), 0)
        coded = torch.softmax(scale * (k_hat[tokens] @ q), 0)
        kls.append(float((coded * (coded / dense[tokens]).log()).sum()))
        o, o_hat = dense @ v[: position + 1], coded @ v_hat[tokens]
        errors.append(float((o_hat - o).square().sum()))
        norms.append(float(o.square().sum()))
        differences.append(scale * ((k_hat - k)[torch.from_numpy(coded_tokens)] @ q))
    return kls, errors, norms, differences


def test_the_plan_is_measured_as_its_tiers_say(run: Run, report: ProfileReport) -> None:
    kls, errors, norms, differences = [], [], [], []
    with CaptureReader(run.capture) as capture, AllocationReader(run.allocation) as allocation:
        for info in allocation.documents_of("judge"):
            found = by_hand(capture, allocation, info)
            for total, part in zip((kls, errors, norms, differences), found, strict=True):
                total += part
    plan = report.content.candidates[0].heads
    every = torch.cat(differences)
    # 1e-5: the frame is float32 on the way to the encoder, so k_hat is turned back with 1e-7.
    assert plan.attention_kl[LAYER, HEAD] == pytest.approx(np.mean(kls), rel=1e-5)
    relative = np.sqrt(np.sum(errors) / np.sum(norms))
    assert plan.output_error[LAYER, HEAD] == pytest.approx(relative, rel=1e-5)
    rms = float(every.square().mean().sqrt())
    assert plan.logit_rmse[LAYER, HEAD] == pytest.approx(rms, rel=1e-5)
    assert plan.logit_max[LAYER, HEAD] == pytest.approx(float(every.abs().max()), rel=1e-5)


def test_bytes_are_those_that_were_allocated(run: Run, report: ProfileReport) -> None:
    with AllocationReader(run.allocation) as allocation:
        infos = allocation.documents_of("judge")
    assert len(infos) == 2
    plan, policy = report.content.candidates[:2]
    laid_out = sum(info.laid_out_bytes for info in infos)
    assert plan.laid_out_bytes == plan.bytes.total == laid_out
    assert plan.bytes.padding == pytest.approx(sum(i.padding_bytes for i in infos), abs=2)
    assert plan.bytes.page_table == sum(i.page_table_bytes for i in infos)
    assert plan.bytes.fixed_tables == sum(i.fixed_table_bytes for i in infos)
    assert policy.laid_out_bytes == sum(i.policy_bytes for i in infos)
    coordinates = 2 * 2 * 2 * 64 * sum(i.n_context for i in infos)
    assert plan.laid_out_rate == 8 * laid_out / coordinates


def test_uniform_bytes_are_those_of_the_cache_that_would_be_built(run: Run) -> None:
    with CaptureReader(run.capture) as capture, AllocationReader(run.allocation) as allocation:
        plans = read_plans(allocation)[0]
        rows = horizon_rows(capture, plans.info, 4)
        inputs = read_layer(capture, plans.info, 0, rows, allocation.frames)
        for index, form in enumerate(allocation.tiers):
            tier, page = placement(Candidate(form.name, "uniform", index), plans, 0, 16)
            cache = lay_out(allocation.tiers, 16, inputs, tier, page)
            for stores_positions in (False, True):
                assert cache_terms(cache, stores_positions=stores_positions) == uniform_terms(
                    allocation.tiers,
                    index,
                    head_dim=64,
                    page_size=16,
                    n_kv_heads=2,
                    n_context=plans.info.n_context,
                    stores_positions=stores_positions,
                )
        assert fixed_table_bytes(allocation.frames, allocation.tiers) > 0


def test_better_tiers_have_smaller_errors_and_bounds_hold(report: ProfileReport) -> None:
    by_name = {c.name: c for c in report.content.candidates}
    order = [c.name for c in report.content.candidates if c.kind == "uniform"]
    assert len(order) == 4
    assert order[2:] == ["int8", "dense"]
    for worse, better in itertools.pairwise(order):
        assert by_name[worse].output_error > by_name[better].output_error
        assert by_name[worse].attention_kl > by_name[better].attention_kl
    for candidate in by_name.values():
        heads = candidate.heads
        assert bool((heads.logit_max <= heads.bound).all())
        assert bool((heads.logit_p99 <= heads.logit_max).all())
        assert 0 < candidate.largest_bound_share <= 1
    for name in order:
        heads = by_name[name].heads
        # Isotropic prediction against 3,000 correlated pairs a head: a quarter is generous.
        assert np.median(heads.logit_rmse / heads.expected_rmse) == pytest.approx(1, abs=0.25)
        assert np.median(heads.expected_rmse / heads.predicted_rmse) == pytest.approx(1, abs=0.1)


def test_the_recursion_agrees_with_the_decoded_keys(report: ProfileReport) -> None:
    plan = report.content.candidates[0]
    assert plan.kernel is None
    assert plan.recursion is not None
    # float64 rounding of sums over 64 coordinates and 100 tokens
    for field in fields(plan.recursion):
        assert float(getattr(plan.recursion, field.name).max()) < 1e-11
    assert all(c.recursion is None for c in report.content.candidates[1:])


class SkewedDecoder:
    """A decoder on every candidate whose logits are off by 1/8 and whose outputs are 2 % long."""

    name = "cuda"
    device = "skewed"

    def __init__(self, output_factor: float) -> None:
        self.output_factor = output_factor

    def decode(self, cache: PagedCache, inputs: LayerInputs) -> Decoded:
        right = ReferenceDecoder().decode(cache, inputs)
        return replace(
            right,
            logits=right.logits + 0.125 / inputs.softmax_scale,
            log_sum_exp=right.log_sum_exp + 0.25,
            output=right.output * self.output_factor,
        )


def test_kernel_error_and_quantisation_error_never_mix(
    run: Run, report: ProfileReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "choose_decoder", lambda *_: (SkewedDecoder(1.02), ""))
    monkeypatch.setattr(stage, "measure_speed", lambda *_: None)
    skewed = profile(REFERENCE, run.capture, run.allocation, tmp_path / "r.json")
    assert not skewed.content.accuracy_only
    for ours, theirs in zip(report.content.candidates, skewed.content.candidates, strict=True):
        for field in fields(HeadErrors):
            a, b = getattr(ours.heads, field.name), getattr(theirs.heads, field.name)
            assert np.array_equal(a, b, equal_nan=True)
        assert theirs.recursion is None
        assert theirs.kernel is not None
        assert theirs.kernel.logit_max == pytest.approx(0.125, abs=1e-9)
        assert theirs.kernel.output_error == pytest.approx(0.02, abs=1e-9)
        assert theirs.kernel.lse_max == pytest.approx(0.25, abs=1e-9)


def test_a_decoder_that_returns_nan_shows(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "choose_decoder", lambda *_: (SkewedDecoder(float("nan")), ""))
    monkeypatch.setattr(stage, "measure_speed", lambda *_: None)
    skewed = profile(REFERENCE, run.capture, run.allocation, tmp_path / "r.json")
    kernel = skewed.content.candidates[0].kernel
    assert kernel is not None
    assert bool(np.isnan(kernel.output_error).all())


def test_two_runs_write_one_digest(run: Run, report: ProfileReport, tmp_path: Path) -> None:
    again = profile(REFERENCE, run.capture, run.allocation, tmp_path / "again.json")
    assert again.digest == report.digest
    opened = Report.open(Path(report.path))
    assert opened.header.digest == report.digest
    assert {role: ref.kind for role, ref in opened.header.inputs.items()} == {
        "capture": "capture",
        "allocation": "allocation",
    }


def test_without_a_gpu_no_speed_is_ever_reported(report: ProfileReport) -> None:
    text = Path(report.path).read_text()
    assert report.content.speed is None
    for word in ("latency", "_us", "gb_per_s", "speedup", "fraction_of"):
        assert word not in text
    assert Report.open(Path(report.path)).content["profile"]["accuracy_only"] is True
    assert report.content.device == "none"


def test_what_a_position_term_takes_is_said(report: ProfileReport) -> None:
    row = SpeedRow(
        n_context=4096,
        batch=1,
        n_layers=6,
        step_us=110.0,
        step_p20_us=109.0,
        step_p80_us=111.0,
        without_term_us=100.0,
        code_bytes=1000,
        metadata_bytes=10,
        gb_per_s=1.0,
        fraction_of_read=0.1,
        baseline="sdpa cudnn",
        baseline_us=220.0,
        speedup=2.0,
        fp8_baseline=None,
        fp8_us=None,
        speedup_over_fp8=None,
    )
    rows = (row, replace(row, batch=8, without_term_us=112.0))
    for n_layers, said in ((4, True), (0, False)):
        speed = SpeedReport(3000.0, 3000.0, rows, n_layers, {}, "No fp8 attention ran.")
        shown = repr(view(replace(report, content=replace(report.content, speed=speed))))
        assert ("in 4 of 6 layers, changes these steps by -1.8 to +10.0 %" in shown) == said


def test_only_the_named_tiers_are_measured(run: Run, tmp_path: Path) -> None:
    options = ProfileOptions(backend="reference", tiers=("int8",), max_queries=5)
    found = profile(options, run.capture, run.allocation, tmp_path / "r.json")
    assert [c.name for c in found.content.candidates] == ["plan", "policy", "int8"]
    assert found.content.documents[0].n_queries <= 5
    # Tiers that were not measured may fit the plan's bytes: nothing is said of them.
    said = [sentence for sentence in found.content.reading if sentence.startswith("The plan takes")]
    assert len(said) == 1 and "less than any tier measured here would" in said[0]
    with pytest.raises(UsageError, match="no tier 'nonsense'"):
        profile(
            ProfileOptions(backend="reference", tiers=("nonsense",)),
            run.capture,
            run.allocation,
            tmp_path / "s.json",
        )
    assert not (tmp_path / "s.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_cuda_backend_without_a_gpu_is_one_clear_line(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    with pytest.raises(EnvironmentUnable, match="needs a CUDA GPU") as caught:
        profile(ProfileOptions(backend="cuda"), run.capture, run.allocation, output)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    with pytest.raises(EnvironmentUnable, match="--min-speedup needs a time"):
        options = ProfileOptions(gates=Gates(min_speedup=2.0))
        profile(options, run.capture, run.allocation, output)
    assert list(tmp_path.iterdir()) == []
    assert "No GPU here" in " ".join(
        profile(ProfileOptions(), run.capture, run.allocation, output).content.reading
    )


def test_gates_hold_for_the_worst_head(run: Run, report: ProfileReport, tmp_path: Path) -> None:
    plan = report.content.candidates[0]
    worst = plan.worst_output_error
    assert worst.value == plan.heads.output_error.max()
    assert worst.value == plan.heads.output_error[worst.layer, worst.head]
    gates = Gates(max_output_error=worst.value, max_logit_rmse=plan.worst_logit_rmse.value * 0.99)
    output = tmp_path / "r.json"
    options = ProfileOptions(backend="reference", gates=gates)
    gated = profile(options, run.capture, run.allocation, output)
    assert [gate.passed for gate in gated.content.gates] == [False, True]
    with pytest.raises(GateFailed, match=r"logit rmse is .* \(layer \d, query head \d\)") as caught:
        require_gates(gated)
    assert caught.value.exit_code == 3
    assert Report.open(output).content["profile"]["gates"][0]["passed"] is False
    require_gates(report)  # no limits, nothing to fail
    broken = replace(plan, worst_attention_kl=replace(worst, value=float("nan")))
    assert [g.passed for g in check_gates(Gates(max_kl=1.0), broken, None)] == [False]
    slow = check_gates(Gates(min_speedup=2.0), plan, 1.9)
    assert [(g.value, g.passed) for g in slow] == [(1.9, False)]
    assert [g.passed for g in check_gates(Gates(min_speedup=2.0), plan, None)] == [False]


def test_the_view_names_every_candidate_and_every_term(report: ProfileReport) -> None:
    text = repr(view(report))
    for candidate in report.content.candidates:
        assert candidate.name in text
    for field in fields(report.content.candidates[0].bytes):
        if getattr(report.content.candidates[0].bytes, field.name):
            assert field.name.replace("_", " ") in text
    for sentence in report.content.reading:
        assert sentence in text


@pytest.mark.parametrize(
    "bad",
    [
        {"backend": "tpu"},
        {"max_queries": 0},
        {"gates": {"max_kl": -1.0}},
        {"gates": {"max_output_error": float("nan")}},
        {"gates": {"min_speedup": 2.0}, "backend": "reference"},
    ],
)
def test_options_that_cannot_be_meant_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        gates = bad.pop("gates", None)
        if isinstance(gates, dict):
            bad["gates"] = Gates(**gates)
        ProfileOptions(**bad)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
