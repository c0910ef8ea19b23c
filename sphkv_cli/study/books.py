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
from sphkv_cli.blocks import counted
from sphkv_cli.errors import SphkvError
from sphkv_cli.evaluation.coding import KeyValueCoding, ModelCacheShape
from sphkv_cli.evaluation.comparator_coding import ComparatorCoding
from sphkv_cli.study.book_timing import (
    KIVI_GROUP,
    Codec,
    Cost,
    KiviCodec,
    PolarCodec,
    measure_costs,
    synthetic_prompt,
)
from sphkv_cli.study.books_report import (
    BOOKS,
    ROTATIONS,
    Judged,
    cost_figure,
    cost_table,
    quality_figure,
    quality_table,
    ratio_table,
    read,
)
from sphkv_cli.study.calibration import (
    ONLINE_TOKENS,
    block_code,
    calibrated_codes,
    mean_frames,
    online_codes,
)
from sphkv_cli.study.coding_errors import coding_errors
from sphkv_cli.study.head_coding import (
    AnalyticBooks,
    FittedBooks,
    HeadCoding,
    OnlineBooks,
)
from sphkv_cli.study.inputs import StudyInputs
from sphkv_cli.study.prompt_protocol import PromptProtocol
from sphkv_cli.study.result import StudyResult
from sphkv_codebooks.comparators.kivi import KiviKeys, KiviValues
from sphkv_codebooks.rotation import Rotation

CODES = (((4, 2, 2, 2), "lloyd_max:2"), ((3, 1, 1, 1), "lloyd_max:1"))
N_SEEDS = 3
TIMED_TOKENS = 16_384


def run(inputs: StudyInputs) -> StudyResult:
    """Judge every kind of books on the judge documents, then time them at 16k tokens."""
    capture = inputs.require_capture()
    documents = inputs.documents("judge")
    protocol = _protocol(documents)
    candidates = _candidates(inputs, capture)
    layers = inputs.layers()
    codings = [coding for candidate in candidates for coding in candidate.codings]
    inputs.progress.start("judging books", len(layers), "layers")
    errors = coding_errors(
        capture,
        documents,
        layers,
        codings,
        protocol,
        max_queries=inputs.options.max_queries,
        progress=inputs.progress,
    )
    kls = _next_token_kl(inputs, documents, codings, protocol)
    judged, first = [], 0
    for candidate in candidates:
        last = first + len(candidate.codings)
        of_seeds = tuple(zip(errors[first:last], kls[first:last], strict=True))
        judged.append(
            Judged(
                candidate.code,
                candidate.rotation,
                candidate.books,
                candidate.codings[0].code_rate(protocol.n_context),
                candidate.codings[0].table_bytes(),
                tuple(e for e, _ in of_seeds),
                tuple(kl for _, kl in of_seeds if kl is not None),
            )
        )
        first = last
    costs = time_books(capture, inputs.seed)
    conditions = [
        f"{counted(len(documents), 'judge document')}, {len(layers)} of {capture.n_layers} layers; "
        f"rotated codes are means over {N_SEEDS} seeds, which intervals are paired over.",
        protocol.description[0].upper() + protocol.description[1:] + ".",
        f"Times: one layer of the model's shape ({capture.n_kv_heads} KV heads of "
        f"{capture.head_dim}), {TIMED_TOKENS} Gaussian tokens (beyond the captured documents, not "
        f"their content), torch on the CPU with {torch.get_num_threads()} threads, unpacked codes.",
    ]
    if kls[0] is not None and len(layers) < capture.n_layers:
        conditions.append("KL is that of all layers coded, the errors are those of some.")
    return StudyResult(
        tables=(quality_table(judged), ratio_table(judged), cost_table(costs, TIMED_TOKENS)),
        figures=(quality_figure(judged), cost_figure(costs, TIMED_TOKENS)),
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


@dataclass(frozen=True)
class Candidate:
    """One row: code, rotation and books by name, and its coding under each rotation seed."""

    code: str
    rotation: str
    books: str
    codings: tuple[KeyValueCoding, ...]


def _candidates(inputs: StudyInputs, capture: CaptureReader) -> list[Candidate]:
    shape = ModelCacheShape(capture.n_layers, capture.n_kv_heads, capture.head_dim)
    fit = inputs.documents("fit")
    found: list[Candidate] = []
    for bits, radius in CODES:
        code = block_code(capture.head_dim, bits, radius)
        for kind in ROTATIONS:
            by_books: dict[str, list[KeyValueCoding]] = {name: [] for name in BOOKS}
            for seed in range(inputs.seed, inputs.seed + (1 if kind == "none" else N_SEEDS)):
                frames = mean_frames(capture, fit, Rotation(kind, capture.head_dim, seed))
                layers = [
                    calibrated_codes(capture, fit, frames, code, layer)
                    for layer in range(capture.n_layers)
                ]
                sources = (AnalyticBooks(code), FittedBooks(layers), OnlineBooks(code))
                for name, source in zip(BOOKS, sources, strict=True):
                    label = f"{code.name}, {kind}, {name}, seed {seed}"
                    by_books[name].append(HeadCoding(label, code, source, frames, shape))
            found += [
                Candidate(code.name, kind, name, tuple(codings))
                for name, codings in by_books.items()
            ]
    if capture.head_dim % KIVI_GROUP == 0:
        for n_bits in (2, 4):
            keys, values = KiviKeys(n_bits), KiviValues(n_bits)
            kivi = ComparatorCoding(f"KIVI-{n_bits}", keys, values, shape)
            found.append(Candidate(kivi.name, "-", "-", (kivi,)))
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
