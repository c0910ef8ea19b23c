"""`sphkv profile`: what a plan costs in error and bytes, on documents nobody fitted on.

Protocol: the context of each judge document is coded once, as the plan says; the captured queries
after it read the coded context merged (log-sum-exp) with the exact dense rest, causally.
Quantisation error is that of the codes in float64 against dense keys and values; a decoder's error
is against the float64 decode of the same codes.
"""

import time
from pathlib import Path

import numpy as np

from sphkv_cli.allocation.layout import fixed_table_bytes
from sphkv_cli.artifacts.allocation import AllocationReader
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.header import collect_provenance
from sphkv_cli.artifacts.report import save_report
from sphkv_cli.artifacts.store import check_outputs, require_unchanged
from sphkv_cli.errors import ArtifactError, EnvironmentUnable
from sphkv_cli.profile.candidates import (
    Candidate,
    DocumentPlans,
    lay_out,
    list_candidates,
    placement,
    read_plans,
)
from sphkv_cli.profile.decoders import choose_decoder
from sphkv_cli.profile.gates import check_gates
from sphkv_cli.profile.layer_inputs import horizon_rows, read_layer
from sphkv_cli.profile.measure import LayerMeasurement, measure_layer
from sphkv_cli.profile.options import ProfileOptions
from sphkv_cli.profile.reading import read_candidates
from sphkv_cli.profile.result import DocumentRow, ProfileReport, ReportContent, SpeedReport
from sphkv_cli.profile.speed import LayerPages, measure_speed
from sphkv_cli.profile.summary import summarise
from sphkv_cli.progress import NullProgress, Progress


def profile(
    options: ProfileOptions,
    capture: Path,
    allocation: Path,
    output: Path,
    *,
    progress: Progress | None = None,
    force: bool = False,
) -> ProfileReport:
    """Judge `allocation` on the judge documents of `capture` and write `output`.

    Call `gates.require_gates` on the result when it has been shown.

    Raises:
        ArtifactError: an input is missing or damaged, the allocation was made from another
            capture, or `output` exists (without `force`) or cannot be written.
        UsageError: a tier that the allocation does not have, or `output` is an input.
        EnvironmentUnable: the CUDA backend, or a speed-up to reach, without a GPU.
        SphkvError: NaN or Inf in the capture, or a document without queries after its context.
    """
    started = time.perf_counter()
    progress = progress or NullProgress()
    check_outputs({"--output": output}, {"CAPTURE": capture, "ALLOCATION": allocation}, force=force)
    with CaptureReader(capture) as reader, AllocationReader(allocation) as planned:
        require_unchanged(allocation)
        planned.require_capture(reader.ref)
        _require_model(reader, planned)
        decoder, note = choose_decoder(options.backend, planned.tiers)
        if options.gates.min_speedup is not None and decoder.name == "reference":
            raise EnvironmentUnable(
                "--min-speedup needs a time, and no GPU kernel runs here", "drop it here"
            )
        candidates = list_candidates(planned.tiers, options.tiers)
        documents = read_plans(planned)
        rows = tuple(horizon_rows(reader, d.info, options.max_queries) for d in documents)
        layers: list[LayerMeasurement] = []
        progress.start("Profiling", reader.n_layers, "layers")
        for layer in range(reader.n_layers):
            layers.append(
                measure_layer(reader, planned, candidates, documents, rows, layer, decoder)
            )
            progress.advance()
        progress.finish()
        speed = _speed(reader, planned, documents[0]) if decoder.name == "cuda" else None
        per_token = 2 * reader.n_layers * reader.n_kv_heads * reader.head_dim
        reports = tuple(
            summarise(
                candidate,
                index,
                layers,
                fixed_bytes=fixed_table_bytes(planned.frames, planned.tiers),
                n_coordinates=per_token * sum(d.info.n_context for d in documents),
                n_documents=len(documents),
                token_shares=_token_shares(candidate, documents, len(planned.tiers)),
                head_weights=planned.head_weights,
                decoder=decoder.name,
            )
            for index, candidate in enumerate(candidates)
        )
        content = ReportContent(
            model=reader.model,
            backend=decoder.name,
            accuracy_only=decoder.name == "reference",
            device=decoder.device,
            page_size=planned.page_size,
            horizon=planned.info.horizon,
            options=("drop", *(tier.name for tier in planned.tiers)),
            documents=tuple(
                DocumentRow(
                    name=d.info.name,
                    n_tokens=d.info.n_tokens,
                    n_context=d.info.n_context,
                    n_queries=int(r.numel()),
                    plan_bytes=d.info.laid_out_bytes,
                )
                for d, r in zip(documents, rows, strict=True)
            ),
            candidates=reports,
            speed=speed,
            gates=check_gates(
                options.gates, reports[0], None if speed is None else speed.smallest_speedup
            ),
            reading=read_candidates(reports, note),
        )
        ref = save_report(
            output,
            {"stage": "profile", "profile": content},
            inputs={"capture": reader.ref, "allocation": planned.ref},
            provenance=collect_provenance(seed=options.seed),
            force=force,
        )
    return ProfileReport(str(output), ref.digest, content, time.perf_counter() - started)


def _speed(
    capture: CaptureReader, allocation: AllocationReader, document: DocumentPlans
) -> SpeedReport | None:
    """Times of the layers without a window, on the plan's pages of one document."""
    rows = horizon_rows(capture, document.info, 1)
    plan = Candidate("plan", "plan")
    layers = []
    for layer, info in enumerate(capture.layers):
        if info.window > 0:
            continue
        inputs = read_layer(capture, document.info, layer, rows, allocation.frames)
        tier, page = placement(plan, document, layer, allocation.page_size)
        cache = lay_out(allocation.tiers, allocation.page_size, inputs, tier, page)
        layers.append(
            LayerPages(
                cache,
                inputs.n_context,
                info.softmax_scale,
                info.logit_softcap,
                inputs.position_term,
            )
        )
    return measure_speed(layers, capture.n_q_heads) if layers else None


def _require_model(capture: CaptureReader, allocation: AllocationReader) -> None:
    info = allocation.info
    wanted = (capture.model_digest, capture.n_layers, capture.n_kv_heads, capture.head_dim)
    found = (info.model_digest, info.n_layers, info.n_kv_heads, info.head_dim)
    if found != wanted:
        raise ArtifactError(
            f"{allocation.path} is for the model {info.model}, {capture.path} for {capture.model}",
            "capture, fit and allocate one model",
        )


def _token_shares(
    candidate: Candidate, documents: tuple[DocumentPlans, ...], n_tiers: int
) -> tuple[float, ...]:
    """Fraction of the tokens in each option, drop first."""
    if candidate.tier is not None:
        return tuple(float(option == candidate.tier) for option in range(-1, n_tiers))
    counts = np.zeros(1 + n_tiers)
    for document in documents:
        tiers = document.tiers[candidate.kind]
        counts += np.bincount(tiers.ravel().astype(np.int64) + 1, minlength=1 + n_tiers)
    return tuple((counts / counts.sum()).tolist())
