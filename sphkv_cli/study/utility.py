"""Can a token's future use be told from its past, and from approximate logits?

Every estimator of utility is computed at the end of a context from exact keys and from keys that
were coded at about 2, 3 and 4 bits, and compared with the oracle, the damage that dropping a token
really does to the queries after the context:

    rank correlation   Spearman's, per (layer, KV head); the median is shown
    overlap            share of the oracle's top 10 % of the tokens among the score's
    regret             true cost of the plan made from calibrated scores over that of the oracle's,
                       both at the same bytes, predicted cost beside it

Scores, weights and calibration come from fit documents, the comparison from select ones.  Source of
the question: the public review of Spherical KV (arXiv 2605.18856); the study is ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from sphkv_cli.allocation.budget import Budget
from sphkv_cli.allocation.coding import TierFormats
from sphkv_cli.allocation.coherence import DROP_START
from sphkv_cli.allocation.context import split_document
from sphkv_cli.allocation.estimator_names import COMBINATION, ORACLE
from sphkv_cli.allocation.future_queries import FutureQueries
from sphkv_cli.allocation.head_weights import HeadWeighting
from sphkv_cli.allocation.layout import PageLayout, order_tiers
from sphkv_cli.blocks import Table, counted
from sphkv_cli.plots.figures import Figure, PlotPanel, Series
from sphkv_cli.study.calibration import block_code, mean_frames
from sphkv_cli.study.inputs import StudyInputs
from sphkv_cli.study.result import StudyResult
from sphkv_cli.study.utility_plans import PlanCosts, compare_plans
from sphkv_cli.study.utility_scores import ESTIMATORS, EXACT, ScoredDocument, Scoring
from sphkv_codebooks.rotation import Rotation
from sphkv_kernels.tier import TierFormat

Float = NDArray[np.float64]

HORIZON, WINDOW, PAGE_SIZE = 128, 64, 32
BUDGET = "2b"
TOP_SHARE = 0.1
KEY_CODES = {
    "4 bits": ((5, 3, 3, 3), "lloyd_max:3"),
    "3 bits": ((4, 2, 2, 2), "lloyd_max:2"),
    "2 bits": ((3, 1, 1, 1), "lloyd_max:1"),
}
"""Level bits and radius of the codes, by the rate that they come close to."""
_SHOWN = (COMBINATION, "window", "calibration-queries", "expected-attention", "window-pooled")


@dataclass(frozen=True)
class Reliability:
    """One estimator from one kind of keys.

    rank, overlap: (n_layers) medians over select documents and heads; plan: costs of its plans.
    """

    keys: str
    name: str
    rank: Float
    overlap: Float
    plan: PlanCosts


def run(inputs: StudyInputs) -> StudyResult:
    """The study; it needs a capture with fit and select documents."""
    capture = inputs.require_capture()
    fit, select = inputs.documents("fit"), inputs.documents("select")
    rotation = Rotation("hadamard", capture.head_dim, seed=inputs.seed)
    codes = {
        name: block_code(capture.head_dim, bits, radius)
        for name, (bits, radius) in KEY_CODES.items()
    }
    tiers = [*(TierFormat.spherical(code) for code in codes.values()), TierFormat.int8()]
    ordered = order_tiers(tiers, capture.head_dim, PAGE_SIZE)
    weights = HeadWeighting.of(capture, "auto")
    shortest = min(document.n_tokens for document in (*fit, *select))
    horizon, window = min(HORIZON, shortest // 4), min(WINDOW, shortest // 8)
    layers = inputs.layers()
    inputs.progress.start("Scoring documents", len(layers) * len([*fit, *select]), "layers")
    scoring = Scoring(
        capture=capture,
        frames=mean_frames(capture, fit, rotation),
        formats=TierFormats.of(ordered),
        key_codes=codes,
        layers=layers,
        head_weights=torch.from_numpy(weights.values),
        splits={
            document.index: split_document(capture, document, horizon=horizon, window=window)
            for document in (*fit, *select)
        },
        future=FutureQueries.of_capture(capture),
    )
    scored = scoring.score(fit, select, inputs.progress)
    layout = PageLayout(
        tiers=ordered,
        head_dim=capture.head_dim,
        page_size=PAGE_SIZE,
        n_kv_heads=capture.n_kv_heads,
        stores_positions=tuple(capture.layers[layer].window > 0 for layer in layers),
        fixed_bytes=0,
    )
    plans = compare_plans(
        scored[: len(fit)],
        scored[len(fit) :],
        layout,
        Budget.parse(BUDGET),
        scoring.keys,
        DROP_START,
    )
    rows = [
        Reliability(keys, name, *_agreement(scored[len(fit) :], keys, name), plans[keys, name])
        for keys in scoring.keys
        for name in ESTIMATORS
    ]
    rates = {name: code.bits_per_vector / code.head_dim for name, code in codes.items()}
    named = ", ".join(f"{name} = {rate:.2f}" for name, rate in rates.items())
    return StudyResult(
        tables=(_table(rows, plans), _layer_table(rows, layers)),
        figures=(_figure(rows, layers, {**rates, EXACT: 16.0}),),
        reading=_reading(rows),
        conditions=(
            f"{counted(len(select), 'select document')}, scored with what "
            f"{counted(len(fit), 'fit document')} taught; "
            f"the last {horizon} tokens are the future, the {window} before them the window.",
            f"Code rates of the coded keys: {named} bits per coordinate; scores from "
            "coded keys are fitted and calibrated on coded keys.",
            f"Plans: pages of {PAGE_SIZE} at {BUDGET}, drop and {len(ordered)} tiers, drops at "
            f"{DROP_START:g}x their sum, layers {layers[0]} to {layers[-1]} ({len(layers)}).",
            f"Weight of a head: {weights.source}.",
        ),
    )


def _agreement(documents: Sequence[ScoredDocument], keys: str, name: str) -> tuple[Float, Float]:
    """Spearman and overlap with the oracle, (n_layers) medians over documents and heads."""
    ranks, overlaps = [], []
    for document in documents:
        assert document.measured.horizon is not None
        truth, score = document.measured.horizon.drop, document.scores[keys, name]
        ranks.append(spearman(score, truth))
        overlaps.append(top_overlap(score, truth, TOP_SHARE))
    return (
        np.median(np.concatenate(ranks, axis=1), axis=1),
        np.median(np.concatenate(overlaps, axis=1), axis=1),
    )


def spearman(one: Float, other: Float) -> Float:
    """Rank correlation along the last axis; 0 where a side is constant."""
    x, y = (rankdata(side, axis=-1) for side in (one, other))
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    norm = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    found: Float = np.where(norm > 0, (x * y).sum(-1) / np.maximum(norm, 1e-300), 0.0)
    return found


def top_overlap(score: Float, truth: Float, share: float) -> Float:
    """Share of the truth's largest entries among as many of the score's, along the last axis."""
    count = max(1, round(share * truth.shape[-1]))
    best = [np.argsort(-side, axis=-1, kind="stable")[..., :count] for side in (score, truth)]
    marks = np.zeros((2, *truth.shape), dtype=bool)
    for mark, chosen in zip(marks, best, strict=True):
        np.put_along_axis(mark, chosen, True, axis=-1)
    found: Float = (marks[0] & marks[1]).sum(-1) / count
    return found


def _table(rows: Sequence[Reliability], plans: Mapping[tuple[str, str], PlanCosts]) -> Table:
    oracle = plans[EXACT, ORACLE]
    body: list[tuple[object, ...]] = [
        (ORACLE, EXACT, 1.0, 1.0, oracle.predicted, oracle.true, 1.0, 1.0)
    ]
    for row in sorted(rows, key=lambda row: ESTIMATORS.index(row.name)):
        plan = row.plan
        body.append(
            (
                row.name,
                row.keys,
                float(np.median(row.rank)),
                float(np.median(row.overlap)),
                plan.predicted,
                plan.true,
                plan.regret,
                float(np.median(plan.layer_regret)),
            )
        )
    return Table(
        "Estimators against the oracle",
        (
            *("score", "keys", "rank correlation", f"overlap of the top {TOP_SHARE:.0%}"),
            *("predicted cost", "true cost", "regret", "regret in a layer (median)"),
        ),
        body,
        text_columns=2,
    )


def _layer_table(rows: Sequence[Reliability], layers: Sequence[int]) -> Table:
    chosen = [row for row in rows if row.name == COMBINATION]
    return Table(
        "The combination, layer by layer: rank correlation and regret from each kind of keys",
        (
            "layer",
            *(f"rank, {row.keys}" for row in chosen),
            *(f"regret, {row.keys}" for row in chosen),
        ),
        [
            (
                layer,
                *(float(row.rank[i]) for row in chosen),
                *(float(row.plan.layer_regret[i]) for row in chosen),
            )
            for i, layer in enumerate(layers)
        ],
        text_columns=0,
    )


def _figure(
    rows: Sequence[Reliability], layers: Sequence[int], rates: Mapping[str, float]
) -> Figure:
    kinds = list(dict.fromkeys(row.keys for row in rows))
    of = {(row.keys, row.name): row for row in rows}
    places = [rates[kind] for kind in kinds]

    def by_kind(name: str, values: Sequence[float]) -> Series:
        return Series(name, places, values, "both", emphasis=name == COMBINATION)

    axis = "bits per coordinate of the keys read (16 = exact)"
    return Figure(
        "utility",
        "How well scores made at the end of a context order its tokens by their true future use, "
        "from exact and from coded keys.",
        (
            PlotPanel(
                "Rank correlation with the oracle",
                axis,
                "Spearman, median over heads",
                [
                    by_kind(name, [float(np.median(of[kind, name].rank)) for kind in kinds])
                    for name in _SHOWN
                ],
                x_scale="log",
            ),
            PlotPanel(
                f"Regret of the plan at {BUDGET}",
                axis,
                "true cost over the oracle's",
                [by_kind(name, [of[kind, name].plan.regret for kind in kinds]) for name in _SHOWN],
                x_scale="log",
                y_scale="log",
            ),
            PlotPanel(
                "Rank correlation by layer: combination",
                "layer",
                "Spearman, median over heads",
                [Series(kind, layers, list(of[kind, COMBINATION].rank)) for kind in kinds],
            ),
            PlotPanel(
                "Regret by layer: combination",
                "layer",
                "true cost over the oracle's",
                [
                    Series(kind, layers, list(of[kind, COMBINATION].plan.layer_regret))
                    for kind in kinds
                ],
                y_scale="log",
            ),
        ),
    )


def _reading(rows: Sequence[Reliability]) -> tuple[str, str]:
    of = {(row.keys, row.name): row for row in rows}
    singles = [row for row in rows if row.keys == EXACT and row.name != COMBINATION]
    best = min(singles, key=lambda row: row.plan.regret)
    exact = of[EXACT, COMBINATION]
    worse = []
    for keys in KEY_CODES:
        row = of[keys, COMBINATION]
        worse.append(
            f"{np.median(row.rank):.3f} and {row.plan.true / exact.plan.true:.2f}x at {keys}"
        )
    verdict = "beats" if exact.plan.regret < best.plan.regret else "does NOT beat"
    return (
        "From coded keys instead of exact ones, the combination's rank correlation of "
        f"{np.median(exact.rank):.3f} becomes, with the true cost of its plan over that from exact "
        f"keys, {'; '.join(worse)}.",
        f"From exact keys the combination {verdict} the best single score ({best.name}): the plan "
        f"costs {exact.plan.regret:.2f}x the oracle's against {best.plan.regret:.2f}x, at rank "
        f"correlations of {np.median(exact.rank):.3f} and {np.median(best.rank):.3f}.",
    )
