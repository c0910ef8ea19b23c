"""compare: the polar codes and the published methods on the same judge documents at equal bytes.

Directions of k-means and means of keys come from `fit` documents; everything is judged on `judge`
documents, in the uniform protocol.  The frame (centring, and balancing where codebooks have it) is
given to every method or to none: each has a row with it and one without.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.codebooks import CodebooksReader
from sphkv_cli.artifacts.header import ArtifactRef, collect_provenance
from sphkv_cli.artifacts.report import save_report
from sphkv_cli.artifacts.store import check_outputs
from sphkv_cli.comparison.candidates import KEYS_PER_DIRECTION, candidates_of
from sphkv_cli.comparison.measure import measure
from sphkv_cli.comparison.options import CompareOptions
from sphkv_cli.comparison.result import CompareRow, Comparison, Duel, RateStandings
from sphkv_cli.comparison.rows import rows_of
from sphkv_cli.comparison.standings import duels_of, sentence, standings_at
from sphkv_cli.comparison.view import SIDES, figure, tables_of
from sphkv_cli.errors import SphkvError
from sphkv_cli.evaluation.protocol import UniformProtocol
from sphkv_cli.fit.captured_vectors import documents_of
from sphkv_cli.plots.draw import require_drawable, write_figure
from sphkv_cli.progress import NullProgress, Progress
from sphkv_cli.study.calibration import mean_frames
from sphkv_codebooks.comparators.spherical_kmeans import SPHERICAL_KV_TIERS
from sphkv_codebooks.errors import CodeError
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation


def compare(
    options: CompareOptions,
    capture: Path,
    *,
    codebooks: Path | None = None,
    output: Path | None = None,
    plot: Path | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Comparison:
    """Measure every method; write the report to `output` and the figure to `plot`, where given.

    Args:
        codebooks: their frames centre, and their codes take part; without them the mean key of
            the `fit` documents, before RoPE where its frequencies are known.

    Raises:
        ArtifactError: an input is missing or damaged, the codebooks are for another model, or an
            output exists (without `force`) or cannot be written.
        UsageError: one file for both outputs, an output that is an input, or a plot that is neither
            .png nor .svg.
        EnvironmentUnable: a plot without matplotlib.
        SphkvError: NaN or Inf in the capture, no document to fit or judge on, a judge document
            no token of which is read coded, or a method that cannot code these vectors.
    """
    started = time.perf_counter()
    progress = progress or NullProgress()
    check_outputs(
        {"--output": output, "--plot": plot},
        {"CAPTURE": capture, "--codebooks": codebooks},
        force=force,
    )
    require_drawable(plot)
    with CaptureReader(capture) as reader:
        books = None if codebooks is None else CodebooksReader.open(codebooks)
        if books is not None:
            books.require_model(reader)
        judged = documents_of(reader, "judge")[: options.max_documents]
        fitted = documents_of(reader, "fit")
        frame = _frame(reader, books)
        n_fit_tokens = sum(document.n_tokens for document in fitted)
        try:
            candidates = candidates_of(
                options, reader.head_dim, books.codes if books else (), n_fit_tokens
            )
        except CodeError as error:
            raise SphkvError(
                f"the methods do not fit head_dim {reader.head_dim}: {error}",
                "leave the method out with --method",
            ) from error
        layers = _layers(reader.n_layers, options.max_layers)
        protocol = UniformProtocol(options.window, options.first_tokens)
        for document in judged:
            protocol.require_coded(document.name, document.n_tokens)
        progress.start(f"Comparing {len(candidates)} codings", len(layers), "layers")
        measured = measure(
            *(reader, judged, fitted, layers, candidates, frame, protocol, options.max_queries),
            progress,
        )
        progress.finish()
        document_tokens = sum(d.n_tokens for d in judged) // len(judged)
        rows = rows_of(candidates, layers, measured, reader.head_dim, document_tokens)
        standings = tuple(standings_at(rows, r, side) for r in options.rates for side in SIDES)
        duels = tuple(duel for side in SIDES for duel in duels_of(rows, side))
        result = Comparison(
            model=reader.model,
            documents=tuple(document.name for document in judged),
            n_tokens=sum(document.n_tokens for document in judged),
            n_queries=measured.layers[0][0].n_queries // reader.n_q_heads,
            n_layers=len(layers),
            frame=frame.centring_summary,
            rows=rows,
            standings=standings,
            duels=duels,
            tables=tables_of(rows, standings, duels),
            figure=figure(rows),
            reading=_reading(standings, duels, rows),
            conditions=_conditions(options, frame, books, document_tokens),
            elapsed_s=time.perf_counter() - started,
        )
        refs: dict[str, ArtifactRef] = {"capture": reader.ref}
        if books is not None:
            refs["codebooks"] = books.ref
    if plot is not None:
        write_figure(result.figure, plot)
    if output is None:
        return result
    left_out = ("output", "digest", "elapsed_s")
    found = {name: value for name, value in vars(result).items() if name not in left_out}
    content = {"stage": "compare", "compare": {"options": options, **found}}
    provenance = collect_provenance(seed=options.seed)
    ref = save_report(output, content, inputs=refs, provenance=provenance, force=force)
    return replace(result, output=str(output), digest=ref.digest)


def _frame(reader: CaptureReader, books: CodebooksReader | None) -> FrameSet:
    """Centring and balancing without the rotation: each method brings its own."""
    none = Rotation("none", reader.head_dim)
    if books is not None:
        return replace(books.frames, rotation=none)
    return mean_frames(reader, documents_of(reader, "fit"), none)


def _layers(n_layers: int, max_layers: int | None) -> list[int]:
    wanted = min(max_layers or n_layers, n_layers)
    if wanted == 1:
        return [n_layers // 2]
    return [round(i * (n_layers - 1) / (wanted - 1)) for i in range(wanted)]


def _reading(
    standings: Sequence[RateStandings], duels: Sequence[Duel], rows: Sequence[CompareRow]
) -> tuple[str, ...]:
    said = [sentence(s) for s in standings]
    for side in SIDES:
        fought = [duel for duel in duels if duel.side == side and duel.is_level]
        if fought:
            won = sum(duel.ratio > 1 for duel in fought)
            hardest = min(fought, key=lambda duel: duel.ratio)
            said.append(
                f"At the rivals' own bytes, {side} coded, polar has less output error in {won} of "
                f"{len(fought)} settings; it fares worst against {hardest.rival} "
                f"({hardest.setting}, {hardest.rival_rate:.3g} bits): {hardest.ratio:.2f}."
            )
    return (*said, *_tiers(duels), *_centring(rows))


def _tiers(duels: Sequence[Duel]) -> tuple[str, ...]:
    """The tiers of the Spherical KV authors' public code, which lie under a bit."""
    names = {f"spherical k-means g{size} K{count}" for size, count in SPHERICAL_KV_TIERS}
    words = [
        f"{duel.rival_error:.3g} against polar's {duel.polar_error:.3g} at {duel.rival_rate:.2f} "
        f"and {duel.polar_rate:.2f} bits"
        for duel in duels
        if duel.setting in names
    ]
    if not words:
        return ()
    return (
        "The Spherical KV authors' tiers, keys coded, their tables of directions outside the rate: "
        f"{'; '.join(words)}.",
    )


def _centring(rows: Sequence[CompareRow]) -> tuple[str, ...]:
    """What centring does to each family, median over its settings."""
    plain = {(r.family, r.setting): r.key_output_error for r in rows if not r.is_centred}
    gains: dict[str, list[float]] = {}
    for row in rows:
        if row.is_centred and row.key_output_error > 0:
            ratio = plain[row.family, row.setting] / row.key_output_error
            gains.setdefault(row.family, []).append(ratio)
    if not gains:
        return ()
    middle = {name: sorted(found)[len(found) // 2] for name, found in gains.items()}
    most, least = max(middle, key=middle.__getitem__), min(middle, key=middle.__getitem__)
    return (
        f"Centring divides the key output error by {middle[most]:.2f} for {most} (the most) and by "
        f"{middle[least]:.2f} for {least} (the least).",
    )


def _conditions(
    options: CompareOptions, frame: FrameSet, books: CodebooksReader | None, n_tokens: int
) -> tuple[str, ...]:
    origin = "the codebooks" if books is not None else "the `fit` documents"
    balanced = ", balanced" if frame.balancing is not None else ""
    protocol = UniformProtocol(options.window, options.first_tokens)
    return (
        f"Protocol {protocol.description}; window and first tokens are outside all rates.",
        f"Centred: {frame.centring_summary}{balanced}, from {origin}; the same for every method. "
        f"Rotated methods share Haar rotations, mean of {options.seeds} seeds.",
        "polar: least predicted D among codes whose norm keeps six mantissa bits or more; least D: "
        "without that limit.",
        "Key rates count everything stored per token over whole groups of tokens: polar as packed "
        "in pages of 32 tokens, rivals by their papers' bits without padding. Laid out adds the "
        f"dense tail, fitted tables and the mean key of one document of {n_tokens} tokens.",
        "Groups of tokens that reach into the window are coded with all their tokens. Integers, "
        "KIVI and k-means are also taken to bits their papers do not use, so that more rates have "
        f"rivals; k-means needs {KEYS_PER_DIRECTION} `fit` tokens per direction to take part.",
    )
