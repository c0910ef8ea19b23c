"""`sphkv evaluate --probe`: does the coded cache still hold what a later question needs?

The captured model answers for codes stated in a text of the judged domain (copy-back, needle), once
dense and once per code, policy or uniform tier, in the same run.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from sphkv_cli.artifacts.allocation import AllocationReader
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.codebooks import CodebooksReader
from sphkv_cli.artifacts.header import ArtifactRef, collect_provenance
from sphkv_cli.artifacts.report import save_report
from sphkv_cli.artifacts.store import check_outputs, require_unchanged
from sphkv_cli.errors import UsageError
from sphkv_cli.evaluation.candidates import uniform_work
from sphkv_cli.evaluation.copy_back import (
    RecallScore,
    copy_back_prompts,
    copy_back_recall,
)
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.needle import needle_grid, needle_prompts
from sphkv_cli.evaluation.options import EvaluateOptions
from sphkv_cli.evaluation.probe_options import ProbeOptions
from sphkv_cli.evaluation.probe_reading import gates_of, read_probe
from sphkv_cli.evaluation.probe_result import ProbeResult, ProbeRow
from sphkv_cli.evaluation.probe_rows import AskedRow, retention_rows
from sphkv_cli.evaluation.protocol import ReadProtocol
from sphkv_cli.evaluation.recall_prompts import (
    PromptShape,
    RecallPrompt,
    encoder_of,
    start_tokens,
)
from sphkv_cli.evaluation.stage import find_captured, load_captured
from sphkv_cli.generation.context_policy import ContextPolicy
from sphkv_cli.models.load import load_tokenizer
from sphkv_cli.progress import NullProgress, Progress

_RETENTION = (
    "retention: each prompt's context is prefilled dense and coded once, the question and the "
    "answer after it stay dense and read it"
)


def probe(
    options: EvaluateOptions,
    asked: ProbeOptions,
    capture: Path,
    codebooks: Path | None,
    allocation: Path | None,
    output: Path,
    *,
    progress: Progress | None = None,
    force: bool = False,
) -> ProbeResult:
    """Probe the captured model and write a report (JSON) to `output`.

    Args:
        options: model, protocol, codes, methods and tiers as `evaluate` takes them.
        codebooks: whose tiers the uniform protocol runs; allocation: whose policy and tiers the
            retention protocol runs.

    Raises:
        ArtifactError: an input is missing, damaged or of another model; `output` cannot be written.
        UsageError: a protocol without its input, an unknown code, method or tier, a context too
            short for what it states, or `output` is an input.
        EnvironmentUnable: the model cannot be loaded here.
        SphkvError: prompts longer than the model's context, or no text to fill them with.

    Gates are not raised here: show the result, then call `stage.require_gates`.
    """
    started = time.perf_counter()
    progress = progress or NullProgress()
    read = options.files_read(capture, codebooks, allocation)
    check_outputs({"--output": output}, read, force=force)
    inputs: dict[str, ArtifactRef] = {}
    with CaptureReader(capture) as reader:
        inputs["capture"] = reader.ref
        reader.require_model()
        filler = [
            int(token)
            for info in reader.documents_of(options.split)
            for token in reader.token_ids(info)
        ]
        source = find_captured(options, reader, progress)
        tokenizer = load_tokenizer(source)
        shape = PromptShape(
            n_context=asked.lengths[0],
            n_keys=1 if asked.kind == "needle" else asked.keys,
            n_values=asked.values,
            n_digits=asked.digits,
            start=start_tokens(tokenizer),
        )
        prompts = _prompts(asked, shape, encoder_of(tokenizer), filler, options.seed)
        model = load_captured(options, reader, source, progress)
        for prompt in prompts:
            model.require_length(
                f"the probe's {prompt.name!r}", prompt.n_tokens, "lower --probe-length"
            )
        is_uniform = options.protocol == "uniform" or allocation is None
        protocol: ReadProtocol | None = None
        if is_uniform:
            books = None if codebooks is None else CodebooksReader.open(codebooks)
            if codebooks is not None and books is not None:
                require_unchanged(codebooks)
                books.require_capture(reader)
                inputs["codebooks"] = books.ref
            work = uniform_work(options, books, model.shape)(0)
            protocol = work.protocol
            rows = [AskedRow(c.coding.name, c.is_ours, c.coding) for c in work.candidates]
        else:
            assert allocation is not None
            if codebooks is not None or options.methods:
                raise UsageError(
                    "a probe asks the policy of an allocation, or codes and methods",
                    "leave out --codebooks and --method, or pass --protocol uniform",
                )
            require_unchanged(allocation)
            with AllocationReader(allocation) as plans:
                plans.require_capture(reader.ref)
                inputs["allocation"] = plans.ref
                policy = ContextPolicy.of(plans, max(asked.lengths))
                rows = retention_rows(options, asked.lengths, model, policy)
        description = _RETENTION if protocol is None else protocol.description
        progress.start("asking", len(rows) * len(prompts), "prompts")
        filled = [_fill(asked, model, row, prompts, protocol, progress) for row in rows]
        progress.finish()
        gates = gates_of(asked, filled)
        result = ProbeResult(
            path="",
            digest="",
            model=reader.model,
            kind=asked.kind,
            protocol_description=description,
            filler=f"{len(filler):,} tokens of {options.split} documents, repeated where they end",
            lengths=asked.lengths,
            n_prompts=len(prompts),
            n_codes=sum(len(prompt.answers) for prompt in prompts),
            n_digits=sum(stop - start for prompt in prompts for start, stop in prompt.answers),
            is_usable=filled[-1].score.is_usable_control,
            rows=tuple(filled),
            gates=gates,
            reading=read_probe(filled),
            seconds=time.perf_counter() - started,
        )
        ref = save_report(
            output,
            {"stage": "evaluate", "probe": replace(result, path=output.name)},
            inputs=inputs,
            provenance=collect_provenance(seed=options.seed) | {"device": str(model.model.device)},
            force=force,
        )
    return replace(result, path=str(output), digest=ref.digest)


def _prompts(
    asked: ProbeOptions,
    shape: PromptShape,
    encode: Callable[[str], list[int]],
    filler: Sequence[int],
    seed: int,
) -> tuple[RecallPrompt, ...]:
    if asked.kind == "needle":
        return needle_prompts(
            encode,
            filler,
            shape,
            lengths=asked.lengths,
            depths=asked.depths,
            n_prompts=asked.prompts,
            seed=seed,
        )
    return tuple(
        prompt
        for length in asked.lengths
        for prompt in copy_back_prompts(
            encode,
            filler,
            replace(shape, n_context=length),
            n_prompts=asked.prompts,
            seed=seed,
        )
    )


def _fill(
    asked: ProbeOptions,
    model: JudgedModel,
    row: AskedRow,
    prompts: Sequence[RecallPrompt],
    protocol: ReadProtocol | None,
    progress: Progress,
) -> ProbeRow:
    if asked.kind == "copy-back":
        score = copy_back_recall(model, row.coding, prompts, protocol=protocol, progress=progress)
        return ProbeRow(row.name, row.is_ours, _named(score, row.name), None)
    grid, score = needle_grid(
        model,
        row.coding,
        prompts,
        lengths=asked.lengths,
        depths=asked.depths,
        protocol=protocol,
        progress=progress,
    )
    return ProbeRow(row.name, row.is_ours, _named(score, row.name), replace(grid, coding=row.name))


def _named(score: RecallScore, name: str) -> RecallScore:
    return replace(score, coding=name)
