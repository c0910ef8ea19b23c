"""Do means and books fitted on one kind of text serve another, and how much text do they need?

    excess(A -> B) = output error on B's judge documents with means (and books) from A's fit
                     documents / the same with B's own fit documents

and, for a learning curve, output error with the first n tokens of the fit documents over that with
the judge documents themselves.  Captures of every domain are made on
the fly, in a temporary folder.  Source: ours.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.progress import Progress
from sphkv_cli.study.domain_capture import (
    DOCUMENT_TOKENS,
    PROTOCOL,
    Captured,
    capture_domain,
    model_name,
    tokenizer_of,
)
from sphkv_cli.study.domains import all_domains
from sphkv_cli.study.generalisation_report import (
    LearningCurve,
    Transfer,
    curve_figure,
    curve_table,
    read,
    transfer_figure,
    transfer_table,
)
from sphkv_cli.study.head_coding import AnalyticBooks, HeadCoding
from sphkv_cli.study.inputs import StudyInputs
from sphkv_cli.study.result import StudyResult
from sphkv_codebooks.frame import FrameSet

N_SEEDS = 3
FIT_TOKENS = 2048
CURVE_TOKENS = (256, 512, 1024, 2048, 4096, 8192)
"""Of the first domain, whose fit documents are as long as the last of these."""
MAX_LAYERS = 10
"""Layers looked at where no number is asked for: minutes instead of a quarter of an hour."""


def run(inputs: StudyInputs) -> StudyResult:
    """Capture every domain, measure every pair, then the learning curve of the first domain."""
    name = model_name(inputs)
    options = replace(inputs.options, max_layers=inputs.options.max_layers or MAX_LAYERS)
    inputs = replace(inputs, options=options)
    tokenizer = tokenizer_of(name)
    domains, notes = all_domains(tokenizer, CURVE_TOKENS[-1], inputs.seed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sphkv-domains-")))
        captured = []
        for index, domain in enumerate(domains):
            n_fit = CURVE_TOKENS[-1] if index == 0 else FIT_TOKENS
            path = capture_domain(inputs, name, domain, tokenizer, folder, n_fit)
            reader = stack.enter_context(CaptureReader(path))
            captured.append(Captured(domain.name, replace(inputs, capture=reader)))
        n_judged = N_SEEDS * (len(captured) + 2)
        inputs.progress.start("judging calibrations", n_judged, "domains")
        transfer = measure_transfer(captured, inputs.progress)
        curve = measure_curve(captured[0], captured[:2], inputs.progress)
        conditions = (_conditions(name, captured[0]), PROTOCOL.description, *notes)
    return StudyResult(
        tables=(
            transfer_table(transfer, "means", transfer.means),
            transfer_table(transfer, "means and books", transfer.books),
            curve_table(curve),
        ),
        figures=(transfer_figure(transfer), curve_figure(curve)),
        reading=read(transfer, curve),
        conditions=conditions,
    )


def _conditions(model: str, first: Captured) -> str:
    frames = first.centred(first.fit, FIT_TOKENS)
    n_layers = first.capture.n_layers
    return (
        f"{model}: every domain calibrates with {FIT_TOKENS} tokens and is judged on "
        f"{len(first.judge)} documents of {DOCUMENT_TOKENS}, {len(first.inputs.layers())} of "
        f"{n_layers} layers, {first.code.name}, centring {frames.centring_summary}, mean over "
        f"{N_SEEDS} Hadamard rotations."
    )


def measure_transfer(captured: Sequence[Captured], progress: Progress) -> Transfer:
    """Every domain's calibration on every domain's judge documents, under every rotation."""
    n, first = len(captured), captured[0]
    seeds = rotation_seeds(first.inputs)
    errors = np.empty((len(seeds), 1 + 2 * n, n))
    for index, seed in enumerate(seeds):
        codings = [
            HeadCoding(
                "uncentred",
                first.code,
                AnalyticBooks(first.code),
                FrameSet(first.rotation(seed)),
                first.shape,
            ),
            *(
                c.calibrated(c.name, c.fit, FIT_TOKENS, books=books, seed=seed)
                for books in (False, True)
                for c in captured
            ),
        ]
        for column, domain in enumerate(captured):
            errors[index, :, column] = domain.output_errors(codings)
            progress.advance()
    names = tuple(domain.name for domain in captured)
    return Transfer(names, errors[:, 0], errors[:, 1 : 1 + n], errors[:, 1 + n :])


def measure_curve(
    learned: Captured, judged: Sequence[Captured], progress: Progress
) -> LearningCurve:
    """Calibrations on the first n tokens of one domain, judged on some domains."""
    seeds, n = rotation_seeds(learned.inputs), len(CURVE_TOKENS)
    errors = {domain.name: np.empty((len(seeds), 2 * n + 2)) for domain in judged}
    for index, seed in enumerate(seeds):
        codings = [
            learned.calibrated(f"{tokens} tokens", learned.fit, tokens, books=books, seed=seed)
            for books in (False, True)
            for tokens in CURVE_TOKENS
        ]
        for domain in judged:
            n_own = len(domain.judge) * DOCUMENT_TOKENS
            own = [
                domain.calibrated("own", domain.judge, n_own, books=books, seed=seed)
                for books in (False, True)
            ]
            errors[domain.name][index] = domain.output_errors([*codings, *own])
            progress.advance()
    mean = {name: found.mean(axis=0) for name, found in errors.items()}
    return LearningCurve(
        CURVE_TOKENS,
        means={name: found[:n] / found[-2] for name, found in mean.items()},
        books={name: found[n:-2] / found[-1] for name, found in mean.items()},
    )


def rotation_seeds(inputs: StudyInputs) -> range:
    """Of the rotations that every number is a mean over."""
    return range(inputs.seed, inputs.seed + N_SEEDS)
