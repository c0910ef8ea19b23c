"""`sphkv allocate`: Rate-Distortion Retention under one byte budget.

fit documents    calibrate scores into expected damage, and fit the quotas (the policy)
select documents check predictions against measured output errors
judge documents  get plans, made from their context alone; `sphkv profile` judges them

Method: ours, after the retention idea of Spherical KV (arXiv 2605.18856), whose allocator prices a
drop at a constant; here a drop costs what the future is expected to lose by it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from sphkv_cli.allocation.agreement import MeasuredErrors, measure_plans
from sphkv_cli.allocation.budget import Budget
from sphkv_cli.allocation.coding import TierFormats
from sphkv_cli.allocation.coherence import (
    CODE_BOUNDS,
    CODE_START,
    DROP_BOUNDS,
    DROP_START,
    ITERATIONS,
    PlanCoherence,
    measure_coherence,
)
from sphkv_cli.allocation.content import allocation_content
from sphkv_cli.allocation.context import Split, split_document
from sphkv_cli.allocation.estimator_names import COMBINATION
from sphkv_cli.allocation.estimator_store import fit_estimator
from sphkv_cli.allocation.estimators import UtilityEstimator
from sphkv_cli.allocation.head_weights import HeadWeighting
from sphkv_cli.allocation.layout import (
    PageLayout,
    fixed_table_bytes,
    order_tiers,
    position_bytes,
    stores_positions,
)
from sphkv_cli.allocation.measure import MeasuredDocument, measure_document
from sphkv_cli.allocation.options import AllocateOptions
from sphkv_cli.allocation.page_costs import Coefficients
from sphkv_cli.allocation.planning import Placement, PlannedDocument, Planner
from sphkv_cli.allocation.result import AllocationResult
from sphkv_cli.allocation.summary import DROP_CONTROLS, CheckedDocument, summarise
from sphkv_cli.artifacts.allocation import save_allocation
from sphkv_cli.artifacts.capture import CaptureReader, DocumentInfo
from sphkv_cli.artifacts.codebooks import CodebooksReader
from sphkv_cli.artifacts.header import collect_provenance
from sphkv_cli.artifacts.store import check_outputs, require_unchanged
from sphkv_cli.errors import SphkvError, UsageError
from sphkv_cli.progress import NullProgress, Progress
from sphkv_codebooks.frame import FrameSet
from sphkv_kernels.tier import TierFormat

ANCHORS = ("1b", "4b")
"""Budgets at which prices are fitted beside the one asked for; others are interpolated."""
ANCHOR_ITERATIONS = 2
NEAR = 1.25
"""Budgets within this factor share their prices."""


def allocate(
    options: AllocateOptions,
    capture: Path,
    codebooks: Path,
    output: Path,
    *,
    progress: Progress | None = None,
    force: bool = False,
) -> AllocationResult:
    """Allocate `capture` with the tiers of `codebooks` and write `output`.

    Raises:
        ArtifactError: an input is missing or damaged, the codebooks were fitted on another capture
            or model, or `output` exists (without `force`) or cannot be written.
        UsageError: a budget that cannot be laid out, an unknown tier, a horizon or window that
            leaves a document no context, or `output` is an input.
        SphkvError: NaN or Inf in the capture, or a split without documents.
    """
    started = time.perf_counter()
    progress = progress or NullProgress()
    check_outputs({"--output": output}, {"CAPTURE": capture, "CODEBOOKS": codebooks}, force=force)
    books = CodebooksReader.open(codebooks)
    require_unchanged(codebooks)
    with CaptureReader(capture) as reader:
        books.require_capture(reader)
        run = AllocationRun.prepare(options, reader, books, progress)
        planner, fitted = run.fit()
        checked = run.check(planner, fitted)
        planned = [planner.plan(run.measure(document)) for document in run.to_plan()]
        progress.finish()
        if options.plan_select:
            planned += [check.planned for check in checked if check.is_select]
        summary = summarise(options, planner, run.estimator, run.weights, planned, checked)
        ref = save_allocation(
            output,
            allocation_content(
                options, reader, run.frames, run.estimator, run.weights, planner, planned, summary
            ),
            capture=reader.ref,
            codebooks=books.ref,
            provenance=collect_provenance(seed=options.seed),
            force=force,
        )
        return AllocationResult(
            path=str(output),
            digest=ref.digest,
            model=reader.model,
            n_fit_documents=len(fitted),
            seconds=time.perf_counter() - started,
            summary=summary,
        )


@dataclass(frozen=True)
class AllocationRun:
    """What one run of the stage shares between its phases."""

    options: AllocateOptions
    capture: CaptureReader
    frames: FrameSet
    layout: PageLayout
    formats: TierFormats
    weights: HeadWeighting
    splits: dict[int, Split]
    progress: Progress

    @staticmethod
    def prepare(
        options: AllocateOptions, capture: CaptureReader, books: CodebooksReader, progress: Progress
    ) -> "AllocationRun":
        """Check everything that can be checked before the first measurement."""
        for split in ("fit", "judge"):
            if not any(document.split == split for document in capture.documents):
                raise SphkvError(
                    f"the capture has no document of the split {split!r}",
                    "capture at least three documents, or one per split, with `sphkv capture`",
                )
        tiers = order_tiers(_chosen_tiers(options, books), capture.head_dim, options.page_size)
        layout = PageLayout(
            tiers=tiers,
            head_dim=capture.head_dim,
            page_size=options.page_size,
            n_kv_heads=capture.n_kv_heads,
            stores_positions=stores_positions(
                [layer.window for layer in capture.layers], books.frames
            ),
            fixed_bytes=fixed_table_bytes(books.frames, tiers),
            position_bytes=position_bytes(max(d.n_tokens for d in capture.documents)),
        )
        splits = {
            document.index: split_document(
                capture, document, horizon=options.horizon, window=options.window
            )
            for document in capture.documents
        }
        for document in capture.documents:
            n_context = splits[document.index].n_context
            resolved = Budget.parse(options.budget).resolve(layout.n_coordinates(n_context))
            resolved.check(
                minimum_bytes=layout.overhead_bytes(),
                dense_bytes=layout.dense_bytes(n_context),
                document=f"document {document.name!r}",
            )
            options.pins.require(layout, n_context, resolved.n_bytes, f"document {document.name!r}")
        weights = HeadWeighting.of(capture, options.head_weights)
        run = AllocationRun(
            options=options,
            capture=capture,
            frames=books.frames,
            layout=layout,
            formats=TierFormats.of(tiers),
            weights=weights,
            splits=splits,
            progress=progress,
        )
        progress.start("measuring documents", run._n_passes() * capture.n_layers, "layers")
        return run

    def _n_passes(self) -> int:
        """Passes over a document's layers."""
        n_fit, n_all = len(self.capture.documents_of("fit")), len(self.capture.documents)
        n_checked = len(self.capture.documents_of("select")) or n_fit
        n_priced = ITERATIONS + ANCHOR_ITERATIONS * len(self.other_budgets())
        fits_score = self.options.utility == COMBINATION
        return (fits_score + self.options.is_fitted * n_priced) * n_fit + n_all + n_checked

    @cached_property
    def estimator(self) -> UtilityEstimator:
        """The score, fitted when first asked for."""
        return fit_estimator(
            self.options.utility,
            self.capture,
            self.splits,
            self.frames,
            self.head_weights,
            self.progress,
        )

    @property
    def head_weights(self) -> torch.Tensor:
        return torch.from_numpy(self.weights.values)

    @property
    def check_split(self) -> Literal["fit", "select"]:
        """The documents on which predictions are checked: select, or fit where there are none."""
        return "select" if self.capture.documents_of("select") else "fit"

    def fit(self) -> tuple[Planner, list[MeasuredDocument]]:
        """Measure the fit documents and freeze tables, prices and what quotas are fitted from."""
        documents = [self.measure(document) for document in self.capture.documents_of("fit")]
        options, heads = self.options, (self.capture.n_layers, self.capture.n_kv_heads)
        start = Coefficients.constant(
            heads,
            DROP_START if options.drop_coefficient is None else options.drop_coefficient,
            CODE_START if options.code_coefficient is None else options.code_coefficient,
        )
        planner = Planner.fit(
            documents,
            self.layout,
            Budget.parse(options.budget),
            coefficients=start,
            calibrate=options.calibrate,
            is_ceiling=self.estimator.is_ceiling,
            pins=options.pins,
        )
        if not options.is_fitted:
            return planner, documents
        planner = self._priced(planner, documents, ITERATIONS)
        found = [(planner.budget, planner.coefficients)]
        for budget in self.other_budgets():
            nearby = self._priced(replace(planner, budget=budget), documents, ANCHOR_ITERATIONS)
            found.append((budget, nearby.coefficients))
        return planner.priced_by(found, documents[0].n_context), documents

    def other_budgets(self) -> list[Budget]:
        """Those of `ANCHORS` at which prices are fitted too: that every fit document can be laid
        out at, and that are not the budget itself or near it."""
        asked, found = Budget.parse(self.options.budget), []
        contexts = [self.splits[d.index].n_context for d in self.capture.documents_of("fit")]
        for text in ANCHORS:
            anchor = Budget.parse(text)
            fits = []
            for n_context in contexts:
                n_coordinates = self.layout.n_coordinates(n_context)
                rate = asked.resolve(n_coordinates).bits_per_coordinate / anchor.amount
                n_bytes = anchor.resolve(n_coordinates).n_bytes
                least = self.options.pins.minimum_bytes(self.layout, n_context)
                fits.append(
                    max(rate, 1 / rate) > NEAR
                    and least < n_bytes < self.layout.dense_bytes(n_context)
                )
            if all(fits):
                found.append(anchor)
        return found

    def _priced(
        self, planner: Planner, documents: Sequence[MeasuredDocument], iterations: int
    ) -> Planner:
        """With prices of drops and codes moved towards what their plans really do."""
        for _ in range(iterations):
            found = PlanCoherence.total([self._coherence(planner, d) for d in documents])
            drop, code = planner.coefficients.drop, planner.coefficients.code
            if self.options.drop_coefficient is None:
                drop = found.drops.updated(drop, DROP_BOUNDS)
            if self.options.code_coefficient is None:
                code = found.codes.updated(code, CODE_BOUNDS)
            planner = planner.priced_at(Coefficients(drop, code))
        return planner

    def _coherence(self, planner: Planner, document: MeasuredDocument) -> PlanCoherence:
        return measure_coherence(
            self.capture,
            document,
            self.frames,
            self.layout.tiers,
            planner.solved(document).option_of_token,
            self.head_weights,
            self.progress,
        )

    def check(self, planner: Planner, fitted: list[MeasuredDocument]) -> list[CheckedDocument]:
        """Plan the select documents (without any, the fit ones) and measure what comes of it."""
        documents = fitted
        if self.check_split == "select":
            documents = [self.measure(document) for document in self.capture.documents_of("select")]
        found = []
        for document in documents:
            planned = planner.plan(document)
            controls = {
                name: planner.priced_at(
                    replace(planner.coefficients, drop=np.full_like(planner.coefficients.drop, at))
                ).solved(document)
                for name, at in DROP_CONTROLS.items()
            }
            errors = self._measured_errors(planned, controls)
            true_costs = planner.true_costs(document)
            found.append(CheckedDocument(planned, errors, true_costs, controls))
        return found

    def to_plan(self) -> tuple[DocumentInfo, ...]:
        """The judge documents."""
        return self.capture.documents_of("judge")

    def measure(self, document: DocumentInfo) -> MeasuredDocument:
        """Measure one document; of judge documents the context alone (but by the oracle)."""
        return measure_document(
            self.capture,
            document,
            self.splits[document.index],
            self.frames,
            self.formats,
            self.estimator,
            self.head_weights,
            with_horizon=document.split != "judge" or self.estimator.is_ceiling,
            with_output_errors=document.split == self.check_split,
            progress=self.progress,
        )

    def _measured_errors(
        self, planned: PlannedDocument, controls: Mapping[str, Placement]
    ) -> MeasuredErrors:
        plans = {
            "plan": planned.plan.option_of_token,
            "policy": planned.policy.option_of_token,
        }
        for name, baseline in planned.baselines.items():
            plans[name] = baseline.per_head(self.layout)
        for name, control in controls.items():
            plans[name] = control.option_of_token
        return measure_plans(
            self.capture,
            planned.measured,
            self.frames,
            self.layout.tiers,
            plans,
            self.head_weights,
            self.progress,
        )


def _chosen_tiers(options: AllocateOptions, books: CodebooksReader) -> list[TierFormat]:
    """The codebooks' tiers, int8 and dense, or those of them that were named."""
    known = {tier.name: tier for tier in (*books.tiers, TierFormat.int8(), TierFormat.dense())}
    for name in options.tiers:
        if name not in known:
            names = ", ".join(known) + ("" if options.no_drop else " (drop is always)")
            raise UsageError(f"tier {name!r} is not known", f"choose among {names}")
    return [tier for name, tier in known.items() if not options.tiers or name in options.tiers]
