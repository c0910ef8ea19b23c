"""`sphkv evaluate`: next-token KL, perplexity and top-1 of a model that reads a coded cache.

The captured model runs again over the held-out documents of the capture: once dense, and once per
code, method or plan, with every layer's attention reading the coded keys and values.  In the
uniform protocol (codebooks) every query reads the coded past; in the retention protocol
(allocation) a context is coded once.  Likelihoods taken from a prefill alone would never touch the
cache; here they do.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from sphkv_cli.artifacts.allocation import AllocationReader
from sphkv_cli.artifacts.capture import CaptureReader, DocumentInfo
from sphkv_cli.artifacts.codebooks import CodebooksReader
from sphkv_cli.artifacts.header import ArtifactRef, collect_provenance
from sphkv_cli.artifacts.report import save_report
from sphkv_cli.artifacts.store import check_outputs, require_unchanged
from sphkv_cli.errors import GateFailed, SphkvError, UsageError
from sphkv_cli.evaluation.candidates import (
    Work,
    WorkOf,
    beside,
    retention_work,
    uniform_work,
)
from sphkv_cli.evaluation.fresh_retention import (
    fresh_work,
    no_dense_tier_note,
    other_capture_note,
    require_same_model,
    scaled_quotas_note,
)
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.judging import JudgedDocument, judge_document
from sphkv_cli.evaluation.options import EvaluateOptions
from sphkv_cli.evaluation.protocol import RetentionProtocol
from sphkv_cli.evaluation.quantisers import require_use_of_ends, retention_candidates
from sphkv_cli.evaluation.reading import gate_outcomes, read
from sphkv_cli.evaluation.result import DocumentScore, EvaluationResult, GateOutcome, Row
from sphkv_cli.evaluation.stepwise import NAME as STEPWISE
from sphkv_cli.evaluation.stepwise import judge_stepwise
from sphkv_cli.evaluation.summary import mean_over_seeds, summarise
from sphkv_cli.evaluation.token_scores import TokenScores
from sphkv_cli.models.source import ModelSource
from sphkv_cli.progress import NullProgress, Progress


def evaluate(
    options: EvaluateOptions,
    capture: Path,
    codebooks: Path | None,
    allocation: Path | None,
    output: Path,
    *,
    progress: Progress | None = None,
    force: bool = False,
) -> EvaluationResult:
    """Evaluate on the capture's held-out documents and write a report (JSON) to `output`.

    Args:
        codebooks: whose tiers are run; in the uniform protocol None runs published methods only.
        allocation: whose plans and policy the retention protocol runs.

    Raises:
        ArtifactError: an input is missing, damaged or made for another model or capture; `output`
            exists (without `force`) or cannot be written.
        UsageError: a protocol without its input, an unknown code, method or tier; `output` is
            an input.
        EnvironmentUnable: the model cannot be loaded here.
        SphkvError: a document too short to score or longer than the model's context.

    Gates are not raised here: show the result, then call `require_gates`.
    """
    started = time.perf_counter()
    progress = progress or NullProgress()
    read = options.files_read(capture, codebooks, allocation)
    check_outputs({"--output": output}, read, force=force)
    protocol = options.protocol
    if protocol == "auto":
        protocol = "uniform" if allocation is None else "retention"
    if protocol == "retention" and allocation is None:
        raise UsageError("--protocol retention needs an allocation", "pass allocation.h5")
    if options.stepwise and protocol != "retention":
        raise UsageError("--stepwise runs an allocation's policy", "pass --allocation")
    if options.wants_new_plans and protocol != "retention":
        raise UsageError("--budget, --rows and --context plan a context", "pass --allocation")
    inputs: dict[str, ArtifactRef] = {}
    notes: tuple[str, ...] = ()
    with CaptureReader(capture) as reader:
        inputs["capture"] = reader.ref
        reader.require_model()
        books = None if codebooks is None else CodebooksReader.open(codebooks)
        if codebooks is not None and books is not None:
            require_unchanged(codebooks)
            inputs["codebooks"] = books.ref
        if protocol == "uniform":
            if books is not None:
                books.require_capture(reader)
            documents = _documents(options, reader, None)
            model = _load(options, reader, progress)
            judged = _judge(
                options,
                reader,
                documents,
                model,
                uniform_work(options, books, model.shape),
                progress,
            )
        else:
            assert allocation is not None
            require_use_of_ends(options, books)
            require_unchanged(allocation)
            if books is not None:
                # As the allocation, they may be applied to another capture of the model.
                books.require_model(reader)
            with AllocationReader(allocation) as plans:
                inputs["allocation"] = plans.ref
                is_new = options.wants_new_plans or not plans.is_of(reader.ref)
                planned = None if is_new else {info.index for info in plans.documents}
                if is_new:
                    require_same_model(plans, reader)
                    if options.tiers != ("best",):
                        raise UsageError(
                            "--tier runs beside the plans that an allocation holds",
                            "leave out --budget, --rows and --context, and pass its own capture",
                        )
                    if options.stepwise:
                        raise UsageError(
                            "--stepwise runs the plans that an allocation holds",
                            "leave out --budget, --rows and --context, and pass its own capture",
                        )
                documents = _documents(options, reader, planned)
                model = _load(options, reader, progress)
                if is_new:
                    work = fresh_work(options, plans, reader, model)
                    notes = (
                        *other_capture_note(plans, reader),
                        *scaled_quotas_note(plans),
                        *no_dense_tier_note(options, plans),
                    )
                else:
                    work = retention_work(options, plans, model.shape)
                others = retention_candidates(options, books, plans.frames, model.shape)
                work = beside(work, others)
                stepped = allocation if options.stepwise else None
                judged = _judge(options, reader, documents, model, work, progress, stepped)
    result = _result(options, protocol, reader.model, judged, time.perf_counter() - started)
    if judged.left_out:
        notes += (
            f"Not within the bytes of every document, so left out: {', '.join(judged.left_out)}.",
        )
    result = replace(result, reading=(*result.reading, *notes))
    ref = save_report(
        output,
        {"stage": "evaluate", "evaluation": replace(result, path=output.name)},
        inputs=inputs,
        provenance=collect_provenance(seed=options.seed) | {"device": str(model.model.device)},
        force=force,
    )
    return replace(result, path=str(output), digest=ref.digest)


class Gated(Protocol):
    """A report with gates."""

    @property
    def path(self) -> str:
        """Where it was written."""

    @property
    def gates(self) -> tuple[GateOutcome, ...]:
        """What was asked for and found."""


def require_gates(result: Gated) -> None:
    """Raise GateFailed, naming the worst row, if a limit does not hold."""
    failed = [gate for gate in result.gates if not gate.holds]
    if failed:
        first = failed[0]
        raise GateFailed(
            f"{len(failed)} of {len(result.gates)} gates failed: {first.quantity} of {first.row} "
            f"is {first.found:.4g}, the limit is {first.limit:.4g}",
            f"see {result.path}",
        )


@dataclass(frozen=True)
class _Judged:
    """By row name, in order, the dense control last: per document the scores of every seed.

    description: of the protocol; left_out: rows that fit some documents only.
    """

    scores: Mapping[str, list[list[tuple[DocumentScore, TokenScores]]]]
    is_ours: Mapping[str, bool]
    family: Mapping[str, str]
    description: str
    left_out: tuple[str, ...]


def _documents(
    options: EvaluateOptions, reader: CaptureReader, planned: set[int] | None
) -> tuple[DocumentInfo, ...]:
    found = [
        info
        for info in reader.documents_of(options.split)
        if planned is None or info.index in planned
    ]
    if not found:
        raise SphkvError(
            f"there is no {options.split} document to score",
            "allocate with --plan-select" if planned is not None else "capture more documents",
        )
    n_kept = min(options.max_documents or len(found), len(found))
    return tuple(found[index * len(found) // n_kept] for index in range(n_kept))


def _load(options: EvaluateOptions, reader: CaptureReader, progress: Progress) -> JudgedModel:
    return load_captured(options, reader, find_captured(options, reader, progress), progress)


def find_captured(
    options: EvaluateOptions, reader: CaptureReader, progress: Progress
) -> ModelSource:
    """Where the captured model is, and its tokenizer; raises EnvironmentUnable, SphkvError."""
    from sphkv_cli.models.source import resolve_model

    return resolve_model(
        options.model or reader.model,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        gguf_file=options.gguf_file,
        cache_dir=options.cache_dir,
        progress=progress,
    )


def load_captured(
    options: EvaluateOptions, reader: CaptureReader, source: ModelSource, progress: Progress
) -> JudgedModel:
    """The captured model.

    Raises:
        ArtifactError: it is not the captured one.
        EnvironmentUnable, SphkvError: it cannot be loaded or listened to.
    """
    from sphkv_cli.models.load import load_model

    progress.start(f"loading {source.name}", None, "")
    model = JudgedModel.of(load_model(source, options.load))
    progress.finish()
    model.require_captured(reader.info, str(reader.path))
    return model


def _judge(
    options: EvaluateOptions,
    reader: CaptureReader,
    documents: Sequence[DocumentInfo],
    model: JudgedModel,
    work_of: WorkOf,
    progress: Progress,
    stepped: Path | None = None,
) -> _Judged:
    """stepped: the allocation whose drop-in cache is run step by step beside the others."""
    scores: dict[str, list[list[tuple[DocumentScore, TokenScores]]]] = {}
    is_ours: dict[str, bool] = {}
    family: dict[str, str] = {}
    description = ""
    # To know the work of a document can mean to plan it: of the first alone, which comes next.
    n_runs = len(work_of(documents[0].index).candidates)
    progress.start("evaluating", n_runs * len(documents), "runs")
    for info in documents:
        work = work_of(info.index)
        description = work.protocol.description
        document = JudgedDocument(info.name, torch.from_numpy(reader.token_ids(info)))
        found = judge_document(
            model,
            document,
            [candidate.coding for candidate in work.candidates],
            work.protocol,
            logit_chunk=options.logit_chunk,
            progress=progress,
        )
        of_document: dict[str, list[tuple[DocumentScore, TokenScores]]] = {}
        for candidate, score in zip(work.candidates, found, strict=True):
            if candidate is work.candidates[-1] and stepped is not None:
                # Before the control, which is last.
                of_document[STEPWISE] = [_stepwise(options, model, document, work, stepped)]
                is_ours[STEPWISE] = True
            of_document.setdefault(candidate.row, []).append(score)
            is_ours[candidate.row] = candidate.is_ours
            family[candidate.row] = candidate.family
        for row, of_seeds in of_document.items():
            scores.setdefault(row, []).append(of_seeds)
    progress.finish()
    control = work.candidates[-1].row
    left_out = tuple(row for row, found in scores.items() if len(found) < len(documents))
    whole = {row: found for row, found in scores.items() if row not in (*left_out, control)}
    whole[control] = scores[control]
    return _Judged(whole, is_ours, family, description, left_out)


def _stepwise(
    options: EvaluateOptions,
    model: JudgedModel,
    document: JudgedDocument,
    work: Work,
    allocation: Path,
) -> tuple[DocumentScore, TokenScores]:
    assert isinstance(work.protocol, RetentionProtocol)
    n_context = work.protocol.n_context
    policy = next(c.coding for c in work.candidates if c.coding.name == "policy")
    return judge_stepwise(
        model,
        document,
        n_context,
        allocation,
        code_rate=policy.code_rate(n_context),
        logit_chunk=options.logit_chunk,
    )


def _result(
    options: EvaluateOptions, protocol: str, model: str, judged: _Judged, seconds: float
) -> EvaluationResult:
    rows: list[Row] = []
    for name, found in judged.scores.items():
        documents = [mean_over_seeds([score for score, _ in of_seeds]) for of_seeds in found]
        scores = [score for of_seeds in found for _, score in of_seeds]
        is_ours, n_seeds = judged.is_ours[name], len(found[0])
        family = judged.family.get(name, "") or name
        rows.append(
            summarise(name, documents, scores, is_ours=is_ours, n_seeds=n_seeds, family=family)
        )
    dense = rows[-1].documents
    gates = gate_outcomes(options, rows)
    return EvaluationResult(
        path="",
        digest="",
        model=model,
        protocol=protocol,
        protocol_description=judged.description,
        split=options.split,
        n_documents=len(dense),
        n_scored=sum(document.n_scored for document in dense),
        perplexity_dense=math.exp(
            float(np.mean([math.log(document.perplexity_dense) for document in dense]))
        ),
        rows=tuple(rows),
        gates=gates,
        reading=read(protocol, rows),
        seconds=seconds,
    )
