"""fit-codebooks: the frames of one model and an ordered list of candidate codes, measured.

    k' = S A (k - c_t),  v' = S v: what every code of a head sees, and one transformed query asks

Means come from the `fit` documents; which frame a layer gets and what a code costs is measured on
the `select` documents; the `judge` documents are not read. A layer at a time, a chunk of tokens at
a time.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.codebooks import CodebooksContent, ModelShape, save_codebooks
from sphkv_cli.artifacts.empirical_books import book_keys
from sphkv_cli.artifacts.fit_tables import FitTables
from sphkv_cli.artifacts.header import collect_provenance
from sphkv_cli.artifacts.store import check_outputs
from sphkv_cli.errors import SphkvError
from sphkv_cli.fit.angle_survey import (
    VECTOR_KINDS,
    AngleSurvey,
    LayerHistograms,
    count_layer,
)
from sphkv_cli.fit.candidates import candidate_codes, candidate_tiers
from sphkv_cli.fit.captured_vectors import documents_of, layer_chunks, verify
from sphkv_cli.fit.code_measurement import LayerMeasurement, measure_layer
from sphkv_cli.fit.design import design_codes
from sphkv_cli.fit.design_codes import Leaders, leaders_of
from sphkv_cli.fit.design_rows import DesignTables
from sphkv_cli.fit.design_view import read_design
from sphkv_cli.fit.empirical_fit import LayerBooks, codes_of_heads, fit_layer_books, stack_books
from sphkv_cli.fit.frame_reading import read_frames
from sphkv_cli.fit.frames import FittedFrames, fit_frames
from sphkv_cli.fit.layer_pool import each_layer
from sphkv_cli.fit.measured_rows import (
    ModelMeasurement,
    code_rows,
    empirical_rows,
    level_rows,
)
from sphkv_cli.fit.options import FitOptions
from sphkv_cli.fit.reading import read_tables, read_tiers
from sphkv_cli.progress import NullProgress, Progress
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.polar import Pairing
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.tier import TierFormat


@dataclass(frozen=True)
class FitResult:
    """What a fit made: the artifact, its tables, and sentences that say what they mean.

    tiers: names in order; n_vectors: keys (and as many values) measured per code;
    page_sizes: those of `CodeRow.laid_out_rates`; design: of a fit for target rates.
    """

    output: str
    digest: str
    model: str
    rotation: str
    rotation_digest: str
    centring: str
    tiers: tuple[str, ...]
    page_sizes: tuple[int, ...]
    tables: FitTables
    n_vectors: int
    elapsed_s: float
    reading: tuple[str, ...]
    design: DesignTables | None = None


def fit_codebooks(
    options: FitOptions,
    capture: Path,
    output: Path,
    *,
    progress: Progress | None = None,
    force: bool = False,
) -> FitResult:
    """Fit frames and codes to `capture` and write them to `output`.

    Raises:
        ArtifactError: the capture is missing or damaged, or `output` exists (without `force`) or
            cannot be written.
        UsageError: a code or a number of RoPE pairs that cannot be meant for this head_dim, or
            `output` is the capture.
        SphkvError: NaN or Inf in the capture, or no document to fit or select on.
    """
    started = time.perf_counter()
    progress = progress or NullProgress()
    check_outputs({"--output": output}, {"CAPTURE": capture}, force=force)
    with CaptureReader(capture) as reader:
        candidates = _Candidates.of(options, reader.head_dim)
        fitted = fit_frames(options, reader, progress)
        frames = fitted.frames
        codes, tiers, design = candidates.measured(options, reader, fitted, progress)
        survey, measured, empirical, books = _measure(options, reader, frames, codes, progress)
        tables = FitTables(
            codes=code_rows(codes, options.page_sizes, measured),
            levels=level_rows(codes, survey),
            goodness=survey.goodness_rows(),
            kurtosis=survey.kurtosis_rows(),
            empirical=empirical_rows(codes, measured, empirical) if empirical else (),
            frames=fitted.rows,
            design=design.rows if design else (),
        )
        content = CodebooksContent(
            shape=ModelShape(
                model=reader.model,
                model_digest=reader.model_digest,
                n_layers=reader.n_layers,
                n_q_heads=reader.n_q_heads,
                n_kv_heads=reader.n_kv_heads,
                head_dim=reader.head_dim,
            ),
            frames=frames,
            codes=codes,
            tiers=tiers,
            page_sizes=options.page_sizes,
            tables=tables,
            measured=measured.per_head(),
            empirical=stack_books(books) if books else None,
            sinks=fitted.sinks,
        )
        n_tokens = sum(document.n_tokens for document in documents_of(reader, "select"))
        n_vectors = n_tokens * reader.n_layers * reader.n_kv_heads
        ref = save_codebooks(
            output,
            content,
            capture=reader.ref,
            provenance=collect_provenance(seed=options.seed),
            force=force,
        )
    return FitResult(
        output=str(output),
        digest=ref.digest,
        model=content.shape.model,
        rotation=frames.rotation.kind,
        rotation_digest=frames.rotation.digest,
        centring=frames.centring_summary,
        tiers=tuple(tier.name for tier in content.tiers),
        page_sizes=options.page_sizes,
        tables=tables,
        n_vectors=n_vectors,
        elapsed_s=time.perf_counter() - started,
        reading=(
            *read_frames(frames, fitted.sinks, tables.frames, fitted.note),
            *read_tables(tables, frames, measured.kept_key_energy, options.page_sizes),
            *read_tiers(
                [code.name for code in codes],
                [tier.name for tier in tiers],
                are_named=bool(options.tiers),
            ),
            *(read_design(design) if design else ()),
        ),
        design=design,
    )


@dataclass(frozen=True)
class _Candidates:
    """Codes and tiers that are named or the usual ones, or the leaders of target rates.

    Made before anything is measured, so that what cannot be meant is refused at once.
    """

    codes: tuple[SphericalCode, ...]
    tiers: tuple[TierFormat, ...]
    leaders: Leaders

    @staticmethod
    def of(options: FitOptions, head_dim: int) -> "_Candidates":
        if options.target_rates:
            rates, native_only = options.target_rates, options.native_only
            return _Candidates((), (), leaders_of(head_dim, rates, native_only=native_only))
        codes = candidate_codes(options, head_dim)
        return _Candidates(codes, candidate_tiers(options, codes), {})

    def measured(
        self, options: FitOptions, reader: CaptureReader, fitted: FittedFrames, progress: Progress
    ) -> tuple[tuple[SphericalCode, ...], tuple[TierFormat, ...], DesignTables | None]:
        """Codes and tiers; of target rates those that the designer chooses, and its tables."""
        if not self.leaders:
            return self.codes, self.tiers, None
        design = design_codes(
            reader,
            fitted.frames,
            self.leaders,
            progress,
            sink_norms=fitted.sinks.thresholds,
            native_only=options.native_only,
        )
        return design.codes, design.tiers, design.tables


@dataclass(frozen=True)
class _LayerOutcome:
    """What one layer gave: angles per split, both measurements, and its empirical books."""

    fit: LayerHistograms
    select: LayerHistograms
    analytic: LayerMeasurement
    empirical: LayerMeasurement | None
    books: LayerBooks


def _measure(
    options: FitOptions,
    reader: CaptureReader,
    frames: FrameSet,
    codes: tuple[SphericalCode, ...],
    progress: Progress,
) -> tuple[AngleSurvey, ModelMeasurement, ModelMeasurement | None, list[LayerBooks]]:
    """Angles of every layer, and every code on every layer; with empirical books where asked."""
    pairings = tuple(dict.fromkeys(code.pairing for code in codes))
    survey = AngleSurvey(reader.n_layers, reader.n_kv_heads, reader.head_dim, pairings)
    analytic: list[LayerMeasurement] = []
    empirical: list[LayerMeasurement] = []
    books: list[LayerBooks] = []
    progress.start("Measuring codes", reader.n_layers, "layers")

    def outcome_of(layer: int) -> _LayerOutcome:
        return _fit_layer(options, reader, frames, codes, pairings, layer)

    for layer, outcome in enumerate(each_layer(outcome_of, reader.n_layers)):
        survey.add(layer, outcome.fit, outcome.select)
        analytic.append(outcome.analytic)
        if outcome.empirical is not None:
            empirical.append(outcome.empirical)
            books.append(outcome.books)
        progress.advance()
    progress.finish()
    fitted = ModelMeasurement.of(empirical) if empirical else None
    return survey, ModelMeasurement.of(analytic), fitted, books


def _fit_layer(
    options: FitOptions,
    reader: CaptureReader,
    frames: FrameSet,
    codes: tuple[SphericalCode, ...],
    pairings: tuple[Pairing, ...],
    layer: int,
) -> _LayerOutcome:
    fit = count_layer(reader, frames, layer, "fit", pairings)
    shared = [[code] * reader.n_kv_heads for code in codes]
    empirical: LayerMeasurement | None = None
    books: LayerBooks = {}
    if options.density == "empirical":
        books = fit_layer_books(book_keys(codes), fit)
        key_codes, value_codes = (
            [codes_of_heads(code, kind, books, reader.n_kv_heads) for code in codes]
            for kind in VECTOR_KINDS
        )
        empirical = _measure_layer(reader, frames, layer, key_codes, value_codes)
    return _LayerOutcome(
        fit=fit,
        select=count_layer(reader, frames, layer, "select", pairings),
        analytic=_measure_layer(reader, frames, layer, shared, shared),
        empirical=empirical,
        books=books,
    )


def _measure_layer(
    reader: CaptureReader,
    frames: FrameSet,
    layer: int,
    key_codes: list[list[SphericalCode]],
    value_codes: list[list[SphericalCode]],
) -> LayerMeasurement:
    chunks = (
        chunk
        for document in documents_of(reader, "select")
        for chunk in layer_chunks(reader, document, layer)
    )
    info = reader.layers[layer]
    try:
        return measure_layer(
            chunks,
            frames,
            layer,
            key_codes,
            value_codes,
            softmax_scale=info.softmax_scale,
            window=info.window,
        )
    except CodeError as error:
        raise SphkvError(f"layer {layer} cannot be coded: {error}", verify(reader)) from error
