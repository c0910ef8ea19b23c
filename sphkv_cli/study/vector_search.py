"""Is the code an inner-product index? Recall on synthetic unit vectors, at equal bytes.

    recall@k = |top k by q.xhat  and  top k by q.x| / k

Isotropic vectors, and clusters (a mixture of centres with noise, normalised); queries are noisy
members.  Beside TurboQuant-MSE, and product quantisation: groups of consecutive coordinates with
256 k-means centres each (Jegou, Douze and Schmid 2011), fitted on vectors of the same source.
This page and no more: weights and search are not what sphkv designs codes for.  Source: ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sphkv_cli.blocks import Table
from sphkv_cli.comparison.polar_quantizer import PolarQuantizer, packed_rate, polar_code_at
from sphkv_cli.plots.figures import Figure, PlotPanel, Series
from sphkv_cli.study.inputs import StudyInputs
from sphkv_cli.study.result import StudyResult
from sphkv_codebooks.comparators.turboquant_mse import TurboQuantMse
from sphkv_codebooks.rotation import Rotation

HEAD_DIM = 128
N_BASE, N_TRAIN, N_QUERIES = 8192, 4096, 200
N_CENTRES = 100
K = 10
BITS = (1, 2, 4)
_PQ_ROUNDS = 10

Coder = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Source:
    """unit vectors: base (N_BASE, HEAD_DIM), training (N_TRAIN, ...), queries (N_QUERIES, ...)."""

    name: str
    base: Tensor
    training: Tensor
    queries: Tensor


def isotropic(rng: np.random.Generator) -> Source:
    """Uniform on the sphere; queries: members with as much noise as signal."""
    base, training = _unit(rng, N_BASE), _unit(rng, N_TRAIN)
    return Source("isotropic", base, training, _noisy(rng, base))


def clustered(rng: np.random.Generator) -> Source:
    """N_CENTRES centres with noise of half their length."""
    centres = rng.standard_normal((N_CENTRES, HEAD_DIM))

    def draw(n_vectors: int) -> Tensor:
        noise = 0.5 * rng.standard_normal((n_vectors, HEAD_DIM))
        return _normalised(centres[rng.integers(0, N_CENTRES, n_vectors)] + noise)

    base, training = draw(N_BASE), draw(N_TRAIN)
    return Source("clustered", base, training, _noisy(rng, base))


def product_quantizer(training: Tensor, bits: int, seed: int) -> Coder:
    """256 centres per group of 8 / bits coordinates; bits: 1, 2 or 4 per coordinate."""
    group = 8 // bits
    parts = training.reshape(training.shape[0], -1, group).transpose(0, 1).contiguous()
    table = fit_centres(parts, 256, torch.Generator().manual_seed(seed))

    def decode(x: Tensor) -> Tensor:
        cut = x.reshape(x.shape[0], -1, group).transpose(0, 1)
        chosen = torch.cdist(cut, table).argmin(dim=-1)
        picked = table[torch.arange(table.shape[0])[:, None], chosen]
        return picked.transpose(0, 1).reshape(x.shape)

    return decode


def fit_centres(parts: Tensor, n_centres: int, generator: torch.Generator) -> Tensor:
    """Lloyd's k-means of every group at once: (n_groups, n_vectors, group) -> (n_groups,
    n_centres, group), from distinct random vectors; an empty centre stays where it is."""
    n_groups, n_vectors, group = parts.shape
    centres = parts[:, torch.randperm(n_vectors, generator=generator)[:n_centres]].clone()
    for _ in range(_PQ_ROUNDS):
        chosen = torch.cdist(parts, centres).argmin(dim=-1)
        place = chosen[..., None].expand(-1, -1, group)
        sums = torch.zeros_like(centres).scatter_add_(1, place, parts)
        counts = torch.zeros(n_groups, n_centres).scatter_add_(
            1, chosen, torch.ones(n_groups, n_vectors)
        )
        full = (counts > 0)[..., None]
        centres = torch.where(full, sums / counts.clamp_min(1.0)[..., None], centres)
    return centres


def recall(source: Source, decoded: Tensor, k: int = K) -> float:
    """Mean over queries of the share of the true top k among the decoded top k."""
    exact = (source.queries @ source.base.T).topk(k, dim=-1).indices
    found = (source.queries @ decoded.T).topk(k, dim=-1).indices
    hits = (exact[:, :, None] == found[:, None, :]).any(-1)
    return float(hits.to(torch.float64).mean())


@dataclass(frozen=True)
class SearchRow:
    """One method on one source."""

    source: str
    method: str
    bits: int
    rate: float
    distortion: float
    recall_1: float
    recall_k: float


def run(inputs: StudyInputs) -> StudyResult:
    """The study; needs no capture."""
    # A child stream: the Haar rotation draws from the seed's own, and must not know the vectors.
    rng = np.random.default_rng(inputs.seed).spawn(1)[0]
    sources = (isotropic(rng), clustered(rng))
    inputs.progress.start("Searching", 3 * len(BITS) * len(sources), "indexes")
    rows = []
    for source in sources:
        for bits in BITS:
            for method, (rate, coder) in _coders(source, bits, inputs.seed).items():
                rows.append(_row(source, method, bits, rate, coder(source.base)))
                inputs.progress.advance()
    return StudyResult(
        tables=(
            Table(
                f"Inner-product search in {N_BASE:,} unit vectors of {HEAD_DIM} coordinates",
                ("source", "method", "bits per coordinate", "D", "recall@1", f"recall@{K}"),
                [(r.source, r.method, r.rate, r.distortion, r.recall_1, r.recall_k) for r in rows],
                text_columns=2,
            ),
        ),
        figures=(_figure(rows),),
        reading=_reading(rows),
        conditions=(
            f"{N_QUERIES} queries, exact scan of decoded vectors, no index structure; product "
            f"quantisation fitted on {N_TRAIN} other vectors, its tables outside the rate.",
            "The rotated codes also store a norm, which unit vectors do not need.",
        ),
    )


def _coders(source: Source, bits: int, seed: int) -> Mapping[str, tuple[float, Coder]]:
    """Methods at the bytes of TurboQuant-MSE with so many bits, or fewer."""
    turbo = TurboQuantMse(bits, HEAD_DIM, Rotation("haar", HEAD_DIM, seed))
    rate = turbo.rate(HEAD_DIM, 1)
    found: dict[str, tuple[float, Coder]] = {"TurboQuant-MSE": (rate, turbo.reconstruct)}
    code = polar_code_at(HEAD_DIM, rate)
    assert code is not None  # rates of more than a bit always have one
    polar = PolarQuantizer(code, Rotation("hadamard", HEAD_DIM, seed))
    found["polar"] = (packed_rate(code), polar.reconstruct)
    found["product quantisation"] = (float(bits), product_quantizer(source.training, bits, seed))
    return found


def _row(source: Source, method: str, bits: int, rate: float, decoded: Tensor) -> SearchRow:
    error = (decoded - source.base).square().sum(-1, dtype=torch.float64)
    return SearchRow(
        source=source.name,
        method=method,
        bits=bits,
        rate=rate,
        distortion=float(error.mean()),
        recall_1=recall(source, decoded, 1),
        recall_k=recall(source, decoded),
    )


def _figure(rows: Sequence[SearchRow]) -> Figure:
    methods = list(dict.fromkeys(row.method for row in rows))
    panels = []
    for source in dict.fromkeys(row.source for row in rows):
        series = []
        for method in methods:
            points = [r for r in rows if r.method == method and r.source == source]
            series.append(
                Series(
                    method,
                    [r.rate for r in points],
                    [r.recall_k for r in points],
                    "both",
                    emphasis=method == "polar",
                )
            )
        panels.append(PlotPanel(source, "bits per coordinate", f"recall@{K}", series))
    return Figure("recall", "Recall of the true neighbours against bits.", panels)


def _reading(rows: Sequence[SearchRow]) -> tuple[str, str]:
    best = {
        (source, bits): max(
            (r for r in rows if r.source == source and r.bits == bits), key=lambda r: r.recall_k
        )
        for source in ("isotropic", "clustered")
        for bits in BITS
    }
    words = [
        f"{source}: "
        + ", ".join(
            f"{best[source, bits].method} at about {bits} ({best[source, bits].recall_k:.2f})"
            for bits in BITS
        )
        for source in ("isotropic", "clustered")
    ]
    won = sum(row.method == "polar" for row in best.values())
    pq = [r for r in rows if r.method == "product quantisation"]
    ours = {(r.source, r.bits): r for r in rows if r.method == "polar"}
    nearer = [r for r in pq if r.distortion < ours[r.source, r.bits].distortion]
    missed = sum(r.recall_k < ours[r.source, r.bits].recall_k for r in nearer)
    return (
        f"Best recall@{K} by bits per coordinate, {'; '.join(words)}; polar is best in {won} of "
        f"{len(best)}.",
        f"Product quantisation has less D than polar in {len(nearer)} of {len(pq)} cases and "
        f"still less recall in {missed} of those; it works as an index, but nothing here is made "
        "for search (no inverted lists, no fast scan), and weights are not covered at all.",
    )


def _unit(rng: np.random.Generator, n_vectors: int) -> Tensor:
    return _normalised(rng.standard_normal((n_vectors, HEAD_DIM)))


def _noisy(rng: np.random.Generator, base: Tensor) -> Tensor:
    chosen = base[torch.from_numpy(rng.choice(base.shape[0], N_QUERIES, replace=False))].numpy()
    return _normalised(chosen + rng.standard_normal(chosen.shape) / np.sqrt(HEAD_DIM))


def _normalised(x: npt.NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(x / np.linalg.norm(x, axis=-1, keepdims=True)).to(torch.float32)
