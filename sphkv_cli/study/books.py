"""Analytic, offline-empirical and online-per-prompt books: what they give and what they cost.

    analytic   Lloyd-Max of the angle densities: nothing is fitted
    offline    fitted per layer, KV head and level to the `fit` documents
    online     fitted in the same way to the prompt itself, when it is prefilled

Each is judged with and without a rotation: rotated angles follow the densities, others do not.
Source: PolarQuant, arXiv 2502.02617, section 4 (offline and online codebooks); the study is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sphkv_cli.artifacts.capture import CaptureReader, DocumentInfo
from sphkv_cli.blocks import Table
from sphkv_cli.errors import SphkvError
from sphkv_cli.evaluation.coding import KeyValueCoding, ModelCacheShape
from sphkv_cli.evaluation.comparator_coding import ComparatorCoding
from sphkv_cli.plots.figures import Figure, PlotPanel, Series
from sphkv_cli.study.book_timing import (
    KIVI_GROUP,
    Codec,
    Cost,
    KiviCodec,
    PolarCodec,
    measure_costs,
    synthetic_prompt,
)
from sphkv_cli.study.calibration import (
    ONLINE_TOKENS,
    block_code,
    calibrated_codes,
    mean_frames,
    online_codes,
)
from sphkv_cli.study.coding_errors import CodingErrors, coding_errors
from sphkv_cli.study.head_coding import (
    AnalyticBooks,
    BookSource,
    FittedBooks,
    HeadCoding,
    OnlineBooks,
)
from sphkv_cli.study.inputs import StudyInputs
from sphkv_cli.study.prompt_protocol import PromptProtocol
from sphkv_cli.study.result import StudyResult
from sphkv_codebooks.comparators.kivi import KiviKeys, KiviValues
from sphkv_codebooks.rotation import Rotation, RotationKind

CODES = (((4, 2, 2, 2), "lloyd_max:2"), ((3, 1, 1, 1), "lloyd_max:1"))
BOOKS = ("analytic", "offline", "online")
ROTATIONS: tuple[RotationKind, ...] = ("hadamard", "none")
TIMED_TOKENS = 16_384


@dataclass(frozen=True)
class Judged:
    """One coding: where it stands, its errors, and the KL of the next token (None: no model)."""

    code: str
    rotation: str
    books: str
    code_rate: float
    table_bytes: int
    errors: CodingErrors
    kl: float | None


def run(inputs: StudyInputs) -> StudyResult:
    """Judge every kind of books on the judge documents, then time them at 16k tokens."""
    capture = inputs.require_capture()
    documents = inputs.documents("judge")
    protocol = _protocol(documents)
    candidates = _candidates(inputs, capture)
    layers = inputs.layers()
    inputs.progress.start("judging books", len(layers), "layers")
    errors = coding_errors(
        capture,
        documents,
        layers,
        [coding for *_, coding in candidates],
        protocol,
        max_queries=inputs.options.max_queries,
        progress=inputs.progress,
    )
    kls = _next_token_kl(inputs, documents, [coding for *_, coding in candidates], protocol)
    judged = [
        Judged(
            code, rotation, books, coding.code_rate(protocol.n_context), coding.table_bytes(), e, kl
        )
        for (code, rotation, books, coding), e, kl in zip(candidates, errors, kls, strict=True)
    ]
    costs = time_books(capture, inputs.seed)
    conditions = [
        f"{len(documents)} judge documents, {len(layers)} of {capture.n_layers} layers.",
        protocol.description[0].upper() + protocol.description[1:] + ".",
        f"Times: one layer of the model's shape ({capture.n_kv_heads} KV heads of "
        f"{capture.head_dim}), {TIMED_TOKENS} Gaussian tokens (beyond the captured documents, not "
        f"their content), torch on the CPU with {torch.get_num_threads()} threads, unpacked codes.",
    ]
    if kls[0] is not None and len(layers) < capture.n_layers:
        conditions.append("KL is that of all layers coded, the errors are those of some.")
    return StudyResult(
        tables=(_quality_table(judged), _cost_table(costs)),
        figures=(_quality_figure(judged), _cost_figure(costs)),
        reading=read(judged, costs),
        conditions=conditions,
    )


def _protocol(documents: Sequence[DocumentInfo]) -> PromptProtocol:
    """Three quarters of the shortest document, in whole groups of KIVI."""
    shortest = min(document.n_tokens for document in documents)
    n_context = 3 * shortest // 4 // KIVI_GROUP * KIVI_GROUP
    if n_context < KIVI_GROUP:
        raise SphkvError(
            f"the shortest judge document has {shortest} tokens", "capture 64 tokens or more each"
        )
    return PromptProtocol(n_context)


Candidate = tuple[str, str, str, KeyValueCoding]
"""Code, rotation and books by name, and the coding."""


def _candidates(inputs: StudyInputs, capture: CaptureReader) -> list[Candidate]:
    shape = ModelCacheShape(capture.n_layers, capture.n_kv_heads, capture.head_dim)
    fit = inputs.documents("fit")
    found: list[Candidate] = []
    for bits, radius in CODES:
        code = block_code(capture.head_dim, bits, radius)
        for kind in ROTATIONS:
            frames = mean_frames(capture, fit, Rotation(kind, capture.head_dim, inputs.seed))
            offline = FittedBooks(
                [calibrated_codes(capture, fit, frames, code, n) for n in range(capture.n_layers)]
            )
            sources: tuple[BookSource, ...] = (AnalyticBooks(code), offline, OnlineBooks(code))
            for name, source in zip(BOOKS, sources, strict=True):
                label = f"{code.name}, {kind}, {name}"
                found.append(
                    (code.name, kind, name, HeadCoding(label, code, source, frames, shape))
                )
    if capture.head_dim % KIVI_GROUP == 0:
        for n_bits in (2, 4):
            keys, values = KiviKeys(n_bits), KiviValues(n_bits)
            kivi = ComparatorCoding(f"KIVI-{n_bits}", keys, values, shape)
            found.append((kivi.name, "-", "-", kivi))
    return found


def _next_token_kl(
    inputs: StudyInputs,
    documents: Sequence[DocumentInfo],
    codings: Sequence[KeyValueCoding],
    protocol: PromptProtocol,
) -> list[float | None]:
    """Mean over documents, per coding; None for all where no model was named."""
    if inputs.model is None:
        return [None] * len(codings)
    from sphkv_cli.evaluation.judging import JudgedDocument, judge_document

    model, capture = inputs.judged_model, inputs.require_capture()
    inputs.progress.start("running the model", len(documents) * len(codings), "runs")
    kl = np.zeros(len(codings))
    for info in documents:
        ids = torch.from_numpy(capture.token_ids(info))
        document = JudgedDocument(info.name, ids)
        scores = judge_document(model, document, codings, protocol, progress=inputs.progress)
        kl += [score.kl for score, _ in scores]
    return [float(x) for x in kl / len(documents)]


def time_books(capture: CaptureReader, seed: int, n_tokens: int = TIMED_TOKENS) -> list[Cost]:
    """Costs of every kind of books and of KIVI, in one run on the same vectors."""
    head_dim = capture.head_dim
    keys, values, queries = synthetic_prompt(
        n_tokens, capture.n_q_heads, capture.n_kv_heads, head_dim, seed
    )
    code = block_code(head_dim, *CODES[0])
    turned = Rotation("hadamard", head_dim, seed)
    # Fitted books are not uniform on the circle, which the encoder is faster for: fit real ones.
    other, other_values, _ = synthetic_prompt(
        ONLINE_TOKENS, capture.n_q_heads, capture.n_kv_heads, head_dim, seed + 1
    )
    fitted = online_codes(code, turned.apply(other), turned.apply(other_values))
    group = min(KIVI_GROUP, head_dim)
    codecs: list[tuple[str, float, Codec]] = [
        (f"{code.name}, {name}", code.code_rate, PolarCodec(code, turned, books, online=online))
        for name, books, online in (
            ("analytic", None, False),
            ("offline", fitted, False),
            ("online", None, True),
        )
    ]
    for n_bits in (2, 4):
        rate = n_bits + (32 / KIVI_GROUP + 32 / group) / 2
        codecs.append((f"KIVI-{n_bits}", rate, KiviCodec(n_bits)))
    return measure_costs(codecs, keys, values, queries)


def read(judged: Sequence[Judged], costs: Sequence[Cost]) -> tuple[str, str]:
    """Whether fitted books help, with and without rotation; what online books cost."""
    by = {(j.code, j.rotation, j.books): j.errors.output_error for j in judged}
    code = judged[0].code
    turned, straight = ({name: by[code, kind, name] for name in BOOKS} for kind in ROTATIONS)
    best = min(straight, key=lambda name: straight[name])
    gain = {name: 100 * (turned[name] / turned["analytic"] - 1) for name in BOOKS}
    verdict = "still loses to" if straight[best] > turned["analytic"] else "beats"
    first = (
        f"After rotation offline books change the output error of {code} by "
        f"{gain['offline']:+.1f} % and online ones by {gain['online']:+.1f} %; without rotation "
        f"analytic books have x{straight['analytic'] / turned['analytic']:.2f} the error, and the "
        f"best of the others ({best}, x{straight[best] / turned['analytic']:.2f}) {verdict} "
        "rotated analytic ones."
    )
    cost = {c.name.rpartition(", ")[2]: c for c in costs}
    kivi = cost["KIVI-2"]
    prefill = {name: cost[name].prefill_ms / kivi.prefill_ms for name in BOOKS}
    token = {name: cost[name].generation_ms / kivi.generation_ms for name in BOOKS}
    second = (
        f"Coding a prompt takes x{prefill['analytic']:.1f} the time of KIVI-2 with analytic books, "
        f"x{prefill['offline']:.1f} with fitted ones (level 1 is no longer uniform on the circle) "
        f"and x{prefill['online']:.1f} where they are fitted online; a generated token takes "
        f"x{token['analytic']:.1f}, x{token['offline']:.1f} and x{token['online']:.1f}."
    )
    return first, second


def _quality_table(judged: Sequence[Judged]) -> Table:
    return Table(
        "Quality by books",
        (
            "code",
            "rotation",
            "books",
            "b code",
            "tables, KiB",
            "key D",
            "value D",
            "logit rms",
            "output error",
            "worst head",
            "KL",
        ),
        [
            (
                j.code,
                j.rotation,
                j.books,
                f"{j.code_rate:.2f}",
                f"{j.table_bytes / 1024:.1f}",
                j.errors.key_distortion,
                j.errors.value_distortion,
                j.errors.logit_rms,
                j.errors.output_error,
                j.errors.worst_head,
                j.kl,
            )
            for j in judged
        ],
        text_columns=3,
    )


def _cost_table(costs: Sequence[Cost]) -> Table:
    kivi = next(c for c in costs if c.name == "KIVI-2")
    return Table(
        f"Cost of one layer at {TIMED_TOKENS} tokens, ms; x: of KIVI-2",
        ("codec", "b code", "prefill", "of it fit", "x", "one token", "read", "generation", "x"),
        [
            (
                c.name,
                f"{c.code_rate:.2f}",
                f"{c.prefill_ms:.1f}",
                f"{c.fit_ms:.1f}",
                f"{c.prefill_ms / kivi.prefill_ms:.2f}",
                f"{c.token_ms:.2f}",
                f"{c.read_ms:.1f}",
                f"{c.generation_ms:.1f}",
                f"{c.generation_ms / kivi.generation_ms:.2f}",
            )
            for c in costs
        ],
    )


def _quality_figure(judged: Sequence[Judged]) -> Figure:
    panels = []
    for code in dict.fromkeys(j.code for j in judged if j.books in BOOKS):
        series = []
        for kind in ROTATIONS:
            rows = [j for j in judged if j.code == code and j.rotation == kind]
            series.append(
                Series(
                    "no rotation" if kind == "none" else kind,
                    [1.0 + BOOKS.index(j.books) for j in rows],
                    [j.errors.output_error for j in rows],
                    "both",
                )
            )
        panels.append(
            PlotPanel(
                code,
                "books: 1 analytic, 2 offline, 3 online",
                "output error",
                series,
                y_scale="log",
            )
        )
    return Figure("books-quality", "Relative attention-output error by kind of books.", panels)


def _cost_figure(costs: Sequence[Cost]) -> Figure:
    panels = [
        PlotPanel(
            title,
            "bits per coordinate (code rate)",
            "ms per layer",
            [Series(c.name, [c.code_rate], [value], "points") for c, value in parts],
        )
        for title, parts in (
            ("prefill coding", [(c, c.prefill_ms) for c in costs]),
            ("one generated token", [(c, c.generation_ms) for c in costs]),
        )
    ]
    caption = f"Wall-clock of one layer at {TIMED_TOKENS} tokens, torch on the CPU."
    return Figure("books-cost", caption, panels)
