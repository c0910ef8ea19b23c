"""What `evaluate` found, as plain rows."""

from dataclasses import dataclass

from sphkv_cli.evaluation.intervals import Interval


@dataclass(frozen=True)
class PositionBin:
    """Mean KL over the scored positions first..last, mean over documents."""

    first: int
    last: int
    kl: float


@dataclass(frozen=True)
class DocumentScore:
    """One document under one coding.

    kl: mean over scored positions, nats; kl_p99: their 99th percentile; perplexity_dense,
    perplexity_coded: of the next token; top1: fraction of positions whose likeliest token agrees.
    code_rate: bits per coordinate of the coded tokens; laid_out_rate: everything stored for the
    whole cache of the document (dense tokens, padding, page table, fixed tables) over all its
    coordinates; coded_bytes: the part that is not the dense tokens; coded_laid_out_rate: that part
    over the coordinates of the coded tokens; dense_keys: keys that the coding itself left dense,
    dense_key_fraction: of all keys.
    """

    name: str
    n_tokens: int
    n_scored: int
    kl: float
    kl_p99: float
    perplexity_dense: float
    perplexity_coded: float
    top1: float
    code_rate: float
    laid_out_rate: float
    coded_bytes: int
    coded_laid_out_rate: float
    dense_keys: int
    dense_key_fraction: float
    seconds: float


@dataclass(frozen=True)
class Row:
    """One coding over all documents.

    family: rows of one method at several rates share it.
    is_ours: a spherical code, plan or policy that gates hold for; otherwise what it is compared
    with (in retention also our codes, unless named with --code).
    n_seeds: rotation seeds that every document was run with; its scores are their mean.
    kl: arithmetic, kl_geometric: geometric mean over documents with 95 % confidence intervals;
    kl_p99: of all scored positions; perplexity_ratio: coded over dense, geometric mean over
    documents.
    """

    name: str
    family: str
    is_ours: bool
    n_seeds: int
    code_rate: float
    coded_laid_out_rate: float
    laid_out_rate: float
    kl: Interval
    kl_geometric: Interval
    kl_p99: float
    perplexity_ratio: Interval
    top1: Interval
    by_position: tuple[PositionBin, ...]
    documents: tuple[DocumentScore, ...]


@dataclass(frozen=True)
class GateOutcome:
    """A limit on a row; `holds` says whether the row keeps it."""

    row: str
    quantity: str
    limit: float
    found: float
    holds: bool


@dataclass(frozen=True)
class EvaluationResult:
    """The report.

    protocol: name and description; perplexity_dense: geometric mean over documents.
    """

    path: str
    digest: str
    model: str
    protocol: str
    protocol_description: str
    split: str
    n_documents: int
    n_scored: int
    perplexity_dense: float
    rows: tuple[Row, ...]
    gates: tuple[GateOutcome, ...]
    reading: tuple[str, ...]
    seconds: float
