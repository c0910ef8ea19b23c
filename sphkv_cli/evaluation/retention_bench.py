"""Every retention method at several budgets on the same held-out documents.

A document is measured once, in one dense run; every method places it at every budget; the tokens
after the context then read each cache (`retained_context.py`), and the copy-back prompts are
answered through it.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from sphkv_cli.allocation.context import read_context
from sphkv_cli.allocation.estimators import SignalUtility, UtilityEstimator
from sphkv_cli.allocation.frozen import FrozenAllocation
from sphkv_cli.allocation.layout import LaidOutBytes
from sphkv_cli.allocation.measure import MeasuredDocument
from sphkv_cli.allocation.planning import Planner
from sphkv_cli.allocation.signals import SIGNALS
from sphkv_cli.allocation.stage import AllocationRun
from sphkv_cli.errors import SphkvError
from sphkv_cli.evaluation.context_measure import measure_context
from sphkv_cli.evaluation.copy_back import PromptRecall, RecallScore, prompt_recall
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.judging import JudgedDocument, score_of
from sphkv_cli.evaluation.plan_coding import PlanCoding
from sphkv_cli.evaluation.recall_prompts import RecallPrompt
from sphkv_cli.evaluation.result import DocumentScore, Row
from sphkv_cli.evaluation.retained_context import ContextTiers, OutputError, RetainedContext
from sphkv_cli.evaluation.retention_rows import PLAN, Controls, Kind, place_all
from sphkv_cli.evaluation.summary import summarise
from sphkv_cli.evaluation.token_scores import TokenScores, score_tokens
from sphkv_cli.progress import Progress
from sphkv_codebooks.frame import FrameSet

CONTROL_SCORES = ("window", "window-pooled", "recency")
NO_WEIGHTS = "joint, no F"
SHARES = ("codes", "padding", "page_table", "positions", "fixed_tables")
"""Purposes of laid-out bytes."""
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

    predicted: mean over documents; gap: the largest, of what was solved, NaN for the others;
    shares: of the laid-out bytes, as `SHARES`; output_error: of attention outputs, mean over
    documents (the p99 the largest), None for controls; recall: None where it was not asked.
    """

    budget: str
    kind: Kind
    row: Row
    predicted: float
    gap: float
    shares: tuple[float, ...]
    output_error: OutputError | None
    recall: RecallScore | None


@dataclass(frozen=True)
class _Trial:
    """One method at one budget on one document."""

    key: Key
    kind: Kind
    predicted: float
    gap: float
    laid_out: LaidOutBytes
    coding: PlanCoding


@dataclass(frozen=True)
class _Judged:
    """What came of a trial."""

    trial: _Trial
    score: DocumentScore
    tokens: TokenScores
    output_error: OutputError | None


@dataclass(frozen=True)
class Bench:
    """What is compared.

    planners: per budget; control_budgets: those of them at which controls are placed;
    no_weights: fitted without F, for the control of that name, None to leave it out.
    """

    model: JudgedModel
    allocation: FrozenAllocation
    planners: Mapping[str, Planner]
    kinds: tuple[Kind, ...]
    controls: Controls
    control_budgets: tuple[str, ...] = ()
    no_weights: "Bench | None" = None

    def run(
        self,
        documents: Sequence[BenchDocument],
        prompts: Sequence[RecallPrompt],
        progress: Progress,
    ) -> list[BenchRow]:
        """Judge all methods on all documents; one step of progress per reading of the model.

        Raises:
            SphkvError: a document or prompt longer than the model's context.
            UsageError: a budget below the metadata or above the dense cache of a document.
        """
        judged: dict[Key, list[_Judged]] = {}
        for document in documents:
            for found in self._judged(document, progress):
                judged.setdefault(found.trial.key, []).append(found)
        recalls = self._recalls(prompts, progress)
        return [
            _row(of_documents, recalls.get(key))
            # What does not fit every document is no row.
            for key, of_documents in judged.items()
            if len(of_documents) == len(documents)
        ]

    def _judged(self, document: BenchDocument, progress: Progress) -> list[_Judged]:
        trials = self._trials(document.name, document.token_ids, document.n_context, self.kinds)
        context = RetainedContext.of(
            self.model, document.name, document.token_ids, document.n_context
        )
        readings = _Readings(context, ContextTiers(trials[0].coding.tiers, self._frames, context))
        hidden = [readings.hidden(trial.coding, progress) for trial in trials]
        seconds = [readings.seconds(trial.coding) for trial in trials]
        errors = [
            None if trial.kind == "control" else readings.output_error(trial.coding)
            for trial in trials
        ]
        n_after = document.token_ids.numel() - document.n_context
        scores = score_tokens(
            self.model.head,
            context.hidden,
            readings.distinct,
            context.following.to(context.hidden.device),
            range(n_after - 1),
        )
        found = []
        for trial, place, error, elapsed in zip(trials, hidden, errors, seconds, strict=True):
            tokens = scores[place]
            if not np.isfinite(tokens.kl).all():
                raise SphkvError(
                    f"{trial.coding.name} makes the logits of {document.name} NaN or infinite",
                    "run the model in float32 (--dtype float32)",
                )
            n_context = document.n_context
            score = score_of(
                JudgedDocument(document.name, document.token_ids),
                self.model.shape,
                tokens,
                n_coded=n_context,
                coded_bytes=trial.coding.stored_bytes(n_context) + trial.coding.table_bytes(),
                code_rate=trial.coding.code_rate(n_context),
                dense_keys=0,
                seconds=elapsed,
            )
            tokens = replace(tokens, positions=tokens.positions + n_context)
            found.append(_Judged(trial, score, tokens, error))
        return found

    @property
    def _frames(self) -> FrameSet:
        return self.allocation.frames

    def _trials(
        self, name: str, token_ids: torch.Tensor, n_context: int, kinds: tuple[Kind, ...]
    ) -> list[_Trial]:
        others = {}
        if "control" in kinds:
            others = {score: SignalUtility(SIGNALS[score]) for score in CONTROL_SCORES}
        context = measure_context(
            self.model, self.allocation, name, token_ids, n_context, dict(others)
        )
        found = []
        for budget, planner in self.planners.items():
            at_budget = tuple(
                kind for kind in kinds if kind != "control" or budget in self.control_budgets
            )
            for one in place_all(context, planner, at_budget, self.controls):
                coding = one.coding(self.allocation, self.model.shape)
                found.append(
                    _Trial(
                        (budget, one.name),
                        one.kind,
                        one.cost,
                        one.gap,
                        one.laid_out(planner.layout),
                        coding,
                    )
                )
        if self.no_weights is not None and "control" in kinds:
            found += [
                replace(
                    trial,
                    key=(trial.key[0], NO_WEIGHTS),
                    kind="control",
                    coding=trial.coding.renamed(NO_WEIGHTS),
                )
                for trial in self.no_weights._trials(name, token_ids, n_context, ("own",))
                if trial.key[1] == PLAN
            ]
        return found

    def _recalls(
        self, prompts: Sequence[RecallPrompt], progress: Progress
    ) -> dict[Key, RecallScore]:
        """Of all methods but the controls, where they fit every prompt."""
        found: dict[Key, list[PromptRecall]] = {}
        kinds = tuple(kind for kind in self.kinds if kind != "control")
        for prompt in prompts:
            trials = self._trials(prompt.name, prompt.token_ids, prompt.n_context, kinds)
            context = RetainedContext.of(
                self.model, prompt.name, prompt.token_ids, prompt.n_context
            )
            tiers = ContextTiers(trials[0].coding.tiers, self._frames, context)
            readings = _Readings(context, tiers)
            for trial in trials:
                place = readings.hidden(trial.coding, progress)
                n_bytes = trial.coding.stored_bytes(prompt.n_context) + trial.coding.table_bytes()
                rate = 8.0 * n_bytes / self.model.shape.n_coordinates(prompt.n_context)
                recall = prompt_recall(
                    self.model,
                    prompt,
                    readings.distinct[place],
                    rate,
                    first_position=prompt.n_context,
                )
                found.setdefault(trial.key, []).append(recall)
        return {
            key: RecallScore.of(key[1], of_prompts)
            for key, of_prompts in found.items()
            if len(of_prompts) == len(prompts)
        }


@dataclass
class _Readings:
    """Readings of one context; plans of the same tokens and tiers are read once.

    distinct: final states of every reading.
    """

    context: RetainedContext
    tiers: ContextTiers
    distinct: list[torch.Tensor] = field(default_factory=list)
    _place: dict[bytes, int] = field(default_factory=dict)
    _seconds: list[float] = field(default_factory=list)
    _errors: dict[int, OutputError] = field(default_factory=dict)

    def hidden(self, coding: PlanCoding, progress: Progress) -> int:
        """Index into `distinct`."""
        digest = _digest(coding)
        if digest not in self._place:
            started = time.perf_counter()
            self.distinct.append(self.context.read(self.tiers, coding.tier_of_token))
            self._seconds.append(time.perf_counter() - started)
            self._place[digest] = len(self.distinct) - 1
        progress.advance()
        return self._place[digest]

    def seconds(self, coding: PlanCoding) -> float:
        """Of its reading."""
        return self._seconds[self._place[_digest(coding)]]

    def output_error(self, coding: PlanCoding) -> OutputError:
        """Of its reading."""
        place = self._place[_digest(coding)]
        if place not in self._errors:
            found = self.context.output_error(self.tiers, coding.tier_of_token)
            self._errors[place] = found
        return self._errors[place]


def _digest(coding: PlanCoding) -> bytes:
    return hashlib.sha256(coding.tier_of_token.tobytes()).digest()


def _row(judged: Sequence[_Judged], recall: RecallScore | None) -> BenchRow:
    trial = judged[0].trial
    errors = [one.output_error for one in judged if one.output_error is not None]
    total = sum(one.trial.laid_out.total for one in judged)
    return BenchRow(
        trial.key[0],
        trial.kind,
        summarise(
            trial.key[1],
            [one.score for one in judged],
            [one.tokens for one in judged],
            is_ours=trial.kind != "published",
        ),
        float(np.mean([one.trial.predicted for one in judged])),
        max(one.trial.gap for one in judged),
        tuple(sum(getattr(one.trial.laid_out, name) for one in judged) / total for name in SHARES),
        OutputError(float(np.mean([e.mean for e in errors])), max(e.p99 for e in errors))
        if errors
        else None,
        recall,
    )


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
