"""Every retention method at several budgets on the same held-out documents.

A document is measured once, in one dense run; every method places it at every budget; the model
then reads each cache (retention protocol), and answers the copy-back prompts through it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from sphkv_cli.allocation.context import read_context
from sphkv_cli.allocation.estimators import SignalUtility, UtilityEstimator
from sphkv_cli.allocation.frozen import FrozenAllocation
from sphkv_cli.allocation.measure import MeasuredDocument
from sphkv_cli.allocation.planning import Planner
from sphkv_cli.allocation.signals import SIGNALS
from sphkv_cli.allocation.stage import AllocationRun
from sphkv_cli.evaluation.context_measure import MeasuredContext, measure_context
from sphkv_cli.evaluation.copy_back import CodingOf, RecallScore, copy_back_recall
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.judging import JudgedDocument, judge_document
from sphkv_cli.evaluation.output_errors import OutputError, output_errors
from sphkv_cli.evaluation.plan_coding import PlanCoding
from sphkv_cli.evaluation.protocol import RetentionProtocol
from sphkv_cli.evaluation.recall_prompts import RecallPrompt
from sphkv_cli.evaluation.result import DocumentScore, Row
from sphkv_cli.evaluation.retention_rows import PLAN, Controls, Kind, place_all
from sphkv_cli.evaluation.summary import summarise
from sphkv_cli.evaluation.token_scores import TokenScores
from sphkv_cli.progress import Progress

CONTROL_SCORES = ("window", "window-pooled", "recency")
NO_WEIGHTS = "joint, no F"
Key = tuple[str, str]
"""Budget as given, name of the method."""


@dataclass(frozen=True)
class BenchDocument:
    """token_ids (n_tokens) int64, of which the first n_context are coded."""

    name: str
    token_ids: torch.Tensor
    n_context: int


@dataclass(frozen=True)
class BenchRow:
    """One method at one budget.

    output_error: of attention outputs, mean over documents (the p99 the largest); recall: None
    where it was not asked.
    """

    budget: str
    kind: Kind
    row: Row
    predicted: float
    output_error: OutputError
    recall: RecallScore | None


@dataclass(frozen=True)
class Bench:
    """What is compared.

    planners: per budget; no_weights: the same fitted without F, None to leave that control out.
    """

    model: JudgedModel
    allocation: FrozenAllocation
    planners: Mapping[str, Planner]
    kinds: tuple[Kind, ...]
    controls: Controls
    no_weights: "Bench | None" = None

    def run(
        self,
        documents: Sequence[BenchDocument],
        prompts: Sequence[RecallPrompt],
        progress: Progress,
    ) -> list[BenchRow]:
        """Judge all methods on all documents; one step of progress per run of the model.

        Raises:
            SphkvError: a document or prompt longer than the model's context.
            UsageError: a budget below the metadata or above the dense cache of a document.
        """
        scores: dict[Key, list[tuple[DocumentScore, TokenScores]]] = {}
        kinds: dict[Key, Kind] = {}
        predicted: dict[Key, list[float]] = {}
        errors: dict[Key, list[OutputError]] = {}
        for document in documents:
            placed = self._placed(document)
            found = judge_document(
                self.model,
                JudgedDocument(document.name, document.token_ids),
                [coding for _, _, _, coding in placed],
                RetentionProtocol(document.n_context),
                progress=progress,
            )
            outputs = output_errors(
                self.model,
                [coding for _, _, _, coding in placed],
                document.token_ids,
                document.n_context,
            )
            for (key, kind, cost, _), score, error in zip(placed, found, outputs, strict=True):
                errors.setdefault(key, []).append(error)
                scores.setdefault(key, []).append(score)
                kinds[key] = kind
                predicted.setdefault(key, []).append(cost)
        recalls = self._recalls(prompts, [k for k in kinds if kinds[k] != "control"], progress)
        return [
            BenchRow(
                key[0],
                kinds[key],
                summarise(
                    key[1],
                    [score for score, _ in of_documents],
                    [score for _, score in of_documents],
                    is_ours=kinds[key] != "published",
                ),
                float(np.mean(predicted[key])),
                OutputError(
                    float(np.mean([error.mean for error in errors[key]])),
                    max(error.p99 for error in errors[key]),
                ),
                recalls.get(key),
            )
            # What does not fit every document is no row.
            for key, of_documents in scores.items()
            if len(of_documents) == len(documents)
        ]

    def _placed(self, document: BenchDocument) -> list[tuple[Key, Kind, float, PlanCoding]]:
        context = self._measured(document.name, document.token_ids, document.n_context)
        found = [
            ((budget, one.name), one.kind, one.cost, one.coding(self.allocation, self.model.shape))
            for budget, planner in self.planners.items()
            for one in place_all(context, planner, self.kinds, self.controls)
        ]
        if self.no_weights is not None:
            found += [
                ((budget, NO_WEIGHTS), "control", cost, coding.renamed(NO_WEIGHTS))
                for (budget, name), _, cost, coding in self.no_weights._placed(document)
                if name == PLAN
            ]
        return found

    def _measured(self, name: str, token_ids: torch.Tensor, n_context: int) -> MeasuredContext:
        others = {}
        if "control" in self.kinds:
            others = {score: SignalUtility(SIGNALS[score]) for score in CONTROL_SCORES}
        return measure_context(
            self.model, self.allocation, name, token_ids, n_context, dict(others)
        )

    def _recalls(
        self, prompts: Sequence[RecallPrompt], keys: Sequence[Key], progress: Progress
    ) -> dict[Key, RecallScore]:
        if not prompts:
            return {}
        kinds = tuple(kind for kind in self.kinds if kind != "control")
        codings: dict[str, dict[Key, PlanCoding]] = {}
        for prompt in prompts:
            context = self._measured(prompt.name, prompt.token_ids, prompt.n_context)
            codings[prompt.name] = {
                (budget, one.name): one.coding(self.allocation, self.model.shape)
                for budget, planner in self.planners.items()
                for one in place_all(context, planner, kinds, self.controls)
            }
        found = {}
        for key in keys:
            if all(key in of_prompt for of_prompt in codings.values()):
                found[key] = copy_back_recall(
                    self.model, _by_prompt(codings, key), prompts, progress=progress
                )
        return found


def _by_prompt(codings: Mapping[str, Mapping[Key, PlanCoding]], key: Key) -> CodingOf:
    return lambda prompt: codings[prompt.name][key]


def control_planners(
    run: AllocationRun, planner: Planner, fitted: Sequence[MeasuredDocument]
) -> Controls:
    """Calibrate the controls' scores on the fit documents, as the allocation's own was.

    Raises:
        SphkvError: NaN or Inf in the capture.
    """
    estimators: dict[str, UtilityEstimator] = {
        name: SignalUtility(SIGNALS[name]) for name in CONTROL_SCORES
    }
    scores = [_scores_of(run, document, estimators) for document in fitted]
    found = {}
    for name in CONTROL_SCORES:
        documents = [
            replace(document, scores=of_document[name])
            for document, of_document in zip(fitted, scores, strict=True)
        ]
        found[name] = Planner.fit(
            documents,
            planner.layout,
            planner.budget,
            coefficients=planner.coefficients,
            calibrate=True,
            is_ceiling=False,
        )
    return Controls(found)


def _scores_of(
    run: AllocationRun, document: MeasuredDocument, estimators: Mapping[str, UtilityEstimator]
) -> dict[str, NDArray[np.float64]]:
    found = {name: np.empty(document.scores.shape) for name in estimators}
    for layer in range(run.capture.n_layers):
        context = read_context(
            run.capture, document.info, layer, document.split, run.frames, run.head_weights[layer]
        )
        for name, estimator in estimators.items():
            found[name][layer] = estimator.score(context).numpy()
    return found
