"""Plans made anew from an allocation: other documents, other lengths, other budgets, other methods.

What the allocation froze (score, calibration, prices, what quotas are fitted from) is applied to
each document from one dense run of the model over it; quotas are those of its budget and length, or
of an old allocation scaled.  The documents may be those of another capture of the same model, and
longer ones than it was fitted on.
"""

from functools import lru_cache

import torch

from sphkv_cli.allocation.budget import Budget
from sphkv_cli.allocation.frozen import FrozenAllocation
from sphkv_cli.artifacts.allocation import AllocationReader
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.errors import ArtifactError, SphkvError, UsageError
from sphkv_cli.evaluation.candidate import Candidate
from sphkv_cli.evaluation.candidates import Work, WorkOf
from sphkv_cli.evaluation.coding import DenseCoding
from sphkv_cli.evaluation.context_measure import measure_context
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.options import EvaluateOptions
from sphkv_cli.evaluation.protocol import RetentionProtocol
from sphkv_cli.evaluation.retention_rows import ORACLE, Controls, place_all, wanted_kinds


def require_same_model(allocation: AllocationReader, capture: CaptureReader) -> None:
    """Raise ArtifactError unless both are of one model; the capture may be any of it."""
    if allocation.info.model_digest != capture.model_digest:
        raise ArtifactError(
            f"{allocation.path} allocates {allocation.info.model} (digest "
            f"{allocation.info.model_digest[:12]}), {capture.path} captures {capture.model} "
            f"(digest {capture.model_digest[:12]})",
            "pass a capture of the model that was allocated",
        )


def other_capture_note(allocation: AllocationReader, capture: CaptureReader) -> tuple[str, ...]:
    """What nobody checked where the capture is another than the allocation's."""
    if allocation.is_of(capture.ref):
        return ()
    sources = ", ".join(sorted({document.source for document in capture.documents_of("judge")}))
    return (
        f"The allocation was fitted on another capture: that it learned nothing from {sources} is "
        "not checked here.",
    )


def scaled_quotas_note(allocation: AllocationReader) -> tuple[str, ...]:
    """What to know of an allocation that keeps no costs to fit quotas from; nothing of others."""
    if allocation.quota_fit is not None:
        return ()
    return (
        f"{allocation.path} holds no costs to fit quotas from: those of {allocation.info.budget} "
        "are scaled to every budget and length, which loses much away from them; make it again "
        "with `sphkv allocate`.",
    )


def no_dense_tier_note(options: EvaluateOptions, allocation: AllocationReader) -> tuple[str, ...]:
    """Which published methods have no rows without a dense tier; nothing where they have."""
    tiers = allocation.tiers
    if tiers[-1].kind == "dense" or "published" not in wanted_kinds(options.rows or "own"):
        return ()
    return (
        f"{allocation.path} has no dense tier, which SnapKV, PyramidKV and Ada-KV keep tokens in: "
        "they are left out; allocate with --tier dense for them.",
    )


def fresh_work(
    options: EvaluateOptions,
    allocation: AllocationReader,
    capture: CaptureReader,
    model: JudgedModel,
) -> WorkOf:
    """Every method at every budget, for each document of the capture.

    Raises (when a document's turn comes):
        SphkvError: it is no longer than the context that was asked for.
        UsageError: a budget below its metadata or above its dense cache.
    """
    if allocation.info.utility.get("is_ceiling"):
        raise UsageError(
            f"{allocation.path} scores tokens by the future, which a new text does not have",
            "allocate with another --utility",
        )
    longest = max(document.n_tokens for document in capture.documents)
    frozen = FrozenAllocation.of(allocation, longest)
    budgets = options.budgets or (allocation.info.budget,)
    kinds = wanted_kinds(options.rows or "own")

    @lru_cache(maxsize=1)
    def work(index: int) -> Work:
        document = next(d for d in capture.documents if d.index == index)
        n_context = options.context or document.n_tokens - allocation.info.horizon
        if not 0 < n_context < document.n_tokens - 1:
            raise SphkvError(
                f"document {document.name} has {document.n_tokens} tokens, a context of "
                f"{n_context} leaves none to score",
                "capture longer documents, or give a smaller --context",
            )
        ids = torch.from_numpy(capture.token_ids(document))
        context = measure_context(model, frozen, document.name, ids, n_context)
        found = []
        for budget in budgets:
            planner = frozen.at(Budget.parse(budget), n_context).planner
            for placed in place_all(context, planner, kinds, Controls({})):
                name = placed.name if len(budgets) == 1 else f"{placed.name}, {budget}"
                coding = placed.coding(frozen, model.shape).renamed(name)
                is_ours = placed.kind == "own" and placed.name != ORACLE
                found.append(Candidate(coding, is_ours, placed.name))
        found.append(Candidate(DenseCoding(model.shape), False))
        return Work(tuple(found), RetentionProtocol(n_context))

    return work
