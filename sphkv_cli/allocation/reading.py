"""What the tables of an allocation mean, in sentences; a loss is said as plainly as a gain."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sphkv_cli.allocation.agreement import LayerAgreement
from sphkv_cli.allocation.discovery import Discovery, PositionRow
from sphkv_cli.allocation.estimators import UtilityEstimator
from sphkv_cli.allocation.result import DocumentPlan
from sphkv_cli.blocks import counted, times_text


def read_summary(
    estimator: UtilityEstimator,
    plans: Sequence[DocumentPlan],
    checks: Sequence[DocumentPlan],
    agreement: Sequence[LayerAgreement],
    discovery: Discovery,
) -> tuple[str, ...]:
    """Sentences, the most important first."""
    return (
        *_ceiling(estimator),
        *_comparisons(checks),
        *_certificate(plans),
        *_policy(plans),
        *_uniform_wins(plans),
        *_model(agreement),
        *_coherence(agreement),
        *_coded(agreement),
        *_discovered(discovery, len(plans)),
    )


def _ceiling(estimator: UtilityEstimator) -> tuple[str, ...]:
    if not estimator.is_ceiling:
        return ()
    return ("The oracle looks at the future it is judged on: a ceiling, not a method.",)


def _comparisons(checks: Sequence[DocumentPlan]) -> tuple[str, ...]:
    """Measured output errors, geometric means over the documents."""
    sentences = []
    names = {row.name for check in checks for row in check.baselines if row.name != "policy"}
    for name in sorted(names):
        times = [
            row.measured / check.measured
            for check in checks
            for row in check.baselines
            if row.name == name and row.measured is not None and check.measured
        ]
        if not times:
            continue
        factor = float(np.exp(np.mean(np.log(times))))
        shown = times_text(max(factor, 1 / factor), 3)
        verdict = "below" if factor >= 1 else "ABOVE"
        found = f"is {shown}x {verdict}" if shown != "1" else "ties with that of"
        sentences.append(
            f"Measured on {counted(len(times), f'{checks[0].split} document')}, the plan's output "
            f"error {found} {name} within the same bytes."
        )
    if not any(name.startswith("uniform") for name in names):
        sentences.append("No uniform tier fits this budget: there is nothing to compare with.")
    return tuple(sentences)


def _certificate(plans: Sequence[DocumentPlan]) -> tuple[str, ...]:
    worst = max(plan.gap for plan in plans)
    return (
        f"No choice of tiers for these pages has a predicted cost more than {worst:.2g} "
        "(relative) below the plan's.",
    )


def _policy(plans: Sequence[DocumentPlan]) -> tuple[str, ...]:
    found = [row.times_plan for plan in plans for row in plan.baselines if row.name == "policy"]
    times = times_text(float(np.exp(np.mean(np.log(found)))), 3)
    return (f"The frozen quotas cost {times}x the plan solved for each context (predicted).",)


def _uniform_wins(plans: Sequence[DocumentPlan]) -> tuple[str, ...]:
    n_won = sum(plan.uniform_won for plan in plans)
    if not n_won:
        return ()
    documents = counted(len(plans), "document")
    return (f"On {n_won} of {documents} one tier for all pages is the better plan.",)


def _model(agreement: Sequence[LayerAgreement]) -> tuple[str, ...]:
    ratios = np.array([row.error_ratio for row in agreement])
    worst = int(np.nanargmax(np.abs(np.log(np.maximum(ratios, 1e-12)))))
    error = float(np.nanmedian([row.error_log_correlation for row in agreement]))
    future = float(np.nanmedian([row.future_log_correlation for row in agreement]))
    return (
        f"Predicted against measured output error of the tiers: log correlation {error:.2f}, ratio "
        f"{np.nanmedian(ratios):.2f} (medians over layers), furthest in layer "
        f"{agreement[worst].layer} ({ratios[worst]:.2f}).",
        f"Scores against the future they could not see: log correlation {future:.2f} (median over "
        "layers, pages).",
    )


def _coherence(agreement: Sequence[LayerAgreement]) -> tuple[str, ...]:
    found = np.array([row.drop_coherence for row in agreement])
    priced = np.array([row.drop_coefficient for row in agreement])
    if np.isnan(found).all():
        return ("Nothing was dropped.",)
    low, middle, high = map(times_text, np.nanquantile(found, [0.1, 0.5, 0.9]))
    least, most = times_text(priced.min()), times_text(priced.max())
    return (
        f"Dropped tokens hurt {middle}x their sum (80 % of layers: {low} to {high}); "
        f"drops were priced at {times_text(np.exp(np.log(priced).mean()))}x ({least} to "
        f"{most} by layer), furthest off in layer "
        f"{agreement[_furthest(found, priced)].layer}.",
    )


def _discovered(discovery: Discovery, n_documents: int) -> tuple[str, ...]:
    last = [row for row in discovery.profile("end") if row.last < 32]
    rest = [row for row in discovery.profile("end") if row.first >= 32]
    at_start = sum(row.position == 0 for row in discovery.sinks)
    sentence = (
        f"Unpinned, {discovery.n_sinks} tokens of {counted(n_documents, 'document')} are protected "
        f"by at least half of the heads, token 0 in {at_start} of {n_documents}"
    )
    if not rest:
        return (sentence + ".",)
    near, far = (_mean_bits(rows) for rows in (last, rest))
    return (
        f"{sentence}; the last 32 tokens get {near:.2f} bits per coordinate on average, those "
        f"before them {far:.2f}.",
    )


def _mean_bits(rows: Sequence[PositionRow]) -> float:
    widths = [row.last - row.first + 1 for row in rows]
    return float(np.average([row.bits_per_coordinate for row in rows], weights=widths))


def _coded(agreement: Sequence[LayerAgreement]) -> tuple[str, ...]:
    found = np.array([row.code_coherence for row in agreement])
    priced = np.array([row.code_coefficient for row in agreement])
    if np.isnan(found).all():
        return ()
    worst = agreement[_furthest(found, priced)]
    return (
        f"The plan's coded tokens hurt {times_text(np.nanmedian(found))}x their first-order sum "
        f"(median over layers) and were priced at {times_text(np.exp(np.log(priced).mean()))}x; "
        f"furthest off in layer {worst.layer} ({times_text(worst.code_coherence)} at "
        f"{times_text(worst.code_coefficient)}).",
    )


def _furthest(found: NDArray[np.float64], expected: NDArray[np.float64]) -> int:
    """Index of the largest ratio, either way."""
    distance = np.abs(np.log(np.maximum(found, 1e-12)) - np.log(expected))
    return int(np.nanargmax(np.where(np.isnan(found), -1.0, distance)))
