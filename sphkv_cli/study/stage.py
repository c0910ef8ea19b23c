"""study: run studies one after the other; each is written whole as soon as it is done.

    OUTPUT/NAME/result.json, README.md, one PNG per figure;  OUTPUT/README.md lists what is there

A study that fails or is interrupted leaves nothing; the folders of the others stay.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.header import ArtifactRef, collect_provenance
from sphkv_cli.artifacts.report import Report, save_report, write_text
from sphkv_cli.errors import ArtifactError, SphkvError, UsageError
from sphkv_cli.models.source import local_path
from sphkv_cli.plots.draw import draw, require_matplotlib
from sphkv_cli.progress import NullProgress, Progress
from sphkv_cli.study.folders import check_folder, folder_when_whole
from sphkv_cli.study.inputs import StudyInputs, StudyOptions, open_codebooks
from sphkv_cli.study.page import RESULT_FILE, study_page
from sphkv_cli.study.registry import STUDIES, Study
from sphkv_cli.study.result import StudyResult
from sphkv_codebooks.errors import CodeError

INDEX_FILE = "README.md"


@dataclass(frozen=True)
class StudyOutcome:
    """One study: its result, or why it has none (`skipped` for what it needs, `failed`)."""

    name: str
    question: str
    result: StudyResult | None
    skipped: str
    failed: str
    elapsed_s: float
    folder: str | None
    digest: str | None


@dataclass(frozen=True)
class StudyReport:
    """All studies of one run, in order."""

    outcomes: tuple[StudyOutcome, ...]
    provenance: dict[str, Any]

    @property
    def failures(self) -> tuple[str, ...]:
        """Sentences of the studies that failed."""
        return tuple(f"{o.name}: {o.failed}" for o in self.outcomes if o.failed)


def run_studies(
    studies: Sequence[Study],
    options: StudyOptions,
    *,
    capture: Path | None = None,
    codebooks: Path | None = None,
    model: str | None = None,
    output: Path | None = None,
    skip_unmet: bool = False,
    progress: Progress | None = None,
    force: bool = False,
) -> StudyReport:
    """Run `studies` and write each to `output` (nothing is written without it).

    A study that fails does not end the run; raise on `StudyReport.failures` when it was shown.

    Args:
        skip_unmet: skip studies that need what was not given, instead of refusing.

    Raises:
        UsageError: a study needs what was not given (without `skip_unmet`); an input lies in the
            folder of a study.
        ArtifactError: an input is missing or damaged, or an output exists (without `force`).
        EnvironmentUnable: figures to draw without matplotlib.
    """
    progress = progress or NullProgress()
    unmet = {study.name: _unmet(study, capture, codebooks, model) for study in studies}
    if not skip_unmet:
        for name, missing in unmet.items():
            if missing:
                raise UsageError(f"the study {name} needs {missing}", "give it, or leave it out")
    if output is not None:
        wanted = [study for study in studies if not unmet[study.name]]
        read = {"--capture": capture, "--codebooks": codebooks, "--model": local_path(model)}
        _check_output(output, wanted, read, force=force)
    provenance = collect_provenance(seed=options.seed)
    with ExitStack() as stack:
        reader = None if capture is None else stack.enter_context(CaptureReader(capture))
        inputs = StudyInputs(options, reader, open_codebooks(codebooks, reader), model, progress)
        outcomes = [
            _outcome(study, inputs, unmet[study.name], output, provenance) for study in studies
        ]
    return StudyReport(tuple(outcomes), provenance)


def _unmet(study: Study, capture: Path | None, codebooks: Path | None, model: str | None) -> str:
    """What the study lacks, in words; a capture names its own model."""
    if "capture" in study.needs and capture is None:
        return "a capture (--capture)"
    if "codebooks" in study.needs and codebooks is None:
        return "codebooks of its model (--codebooks)"
    if "model" in study.needs and capture is None and model is None:
        return "a model (--model)"
    return ""


def _check_output(
    output: Path, studies: Sequence[Study], inputs: Mapping[str, Path | None], *, force: bool
) -> None:
    require_matplotlib("--output")
    if output.exists() and not output.is_dir():
        raise ArtifactError(f"{output} is a file", "name a folder with --output")
    for study in studies:
        check_folder(output / study.name, inputs, force=force)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"the folder {output} cannot be made ({error.strerror})", "choose another --output"
        ) from error


def _outcome(
    study: Study, inputs: StudyInputs, unmet: str, output: Path | None, provenance: dict[str, Any]
) -> StudyOutcome:
    started = time.perf_counter()
    result, failed, digest = None, "", None
    if not unmet:
        try:
            result = study.run(inputs)
            if output is not None:
                digest = _write(study, result, inputs, output / study.name, provenance)
                _write_index(output)
        except (SphkvError, CodeError) as error:
            result, failed = None, str(error)
        finally:
            inputs.progress.finish()
    return StudyOutcome(
        name=study.name,
        question=study.question,
        result=result,
        skipped=f"needs {unmet}" if unmet else "",
        failed=failed,
        elapsed_s=time.perf_counter() - started,
        folder=None if output is None or result is None else str(output / study.name),
        digest=digest,
    )


def _write(
    study: Study,
    result: StudyResult,
    inputs: StudyInputs,
    folder: Path,
    provenance: dict[str, Any],
) -> str:
    """Write one study's folder; returns the digest of its numbers."""
    refs: dict[str, ArtifactRef] = {}
    if inputs.capture is not None:
        refs["capture"] = inputs.capture.ref
    if inputs.codebooks is not None:
        refs["codebooks"] = inputs.codebooks.ref
    with folder_when_whole(folder) as temporary:
        content = {
            "stage": "study",
            "study": {
                "name": study.name,
                "question": study.question,
                "model": None if inputs.capture is None else inputs.capture.model,
                "options": inputs.options,
                "tables": result.tables,
                "figures": result.figures,
                "reading": result.reading,
                "conditions": result.conditions,
            },
        }
        ref = save_report(
            temporary / RESULT_FILE, content, inputs=refs, provenance=provenance, force=True
        )
        for figure in result.figures:
            draw(figure, temporary / f"{figure.name}.png")
        page = study_page(study, result, ref.digest, provenance)
        write_text(temporary / INDEX_FILE, page)
    return ref.digest


def _write_index(output: Path) -> None:
    """One page that lists every study lying in `output`, of this run or an earlier one."""
    lines = ["# Studies", ""]
    for study in STUDIES:
        path = output / study.name / RESULT_FILE
        if not path.exists():
            continue
        try:
            found = Report.open(path).content["study"]
            model, reading = found["model"], list(found["reading"])
        except (ArtifactError, KeyError, TypeError):
            # Somebody's damaged study must not cost this one.
            lines.append(f"- {study.name}: {study.name}/{RESULT_FILE} cannot be read, run it again")
            continue
        of_model = f" ({model})" if model else ""
        lines.append(f"- [{study.name}]({study.name}/{INDEX_FILE}){of_model}: {study.question}")
        lines += [f"  {sentence}" for sentence in reading]
    write_text(output / INDEX_FILE, "\n".join(lines) + "\n")
