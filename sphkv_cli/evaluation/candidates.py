"""Which codings a run evaluates: uniform ones for all documents, or plans for each document."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sphkv_cli.allocation.layout import (
    PageLayout,
    fixed_table_bytes,
    position_bytes,
    stores_positions,
)
from sphkv_cli.artifacts.allocation import AllocationReader, PlanInfo
from sphkv_cli.artifacts.codebooks import CodebooksReader
from sphkv_cli.evaluation.candidate import Candidate
from sphkv_cli.evaluation.coding import DenseCoding, ModelCacheShape
from sphkv_cli.evaluation.options import (
    UNIFORM_FIRST_TOKENS,
    UNIFORM_WINDOW,
    EvaluateOptions,
)
from sphkv_cli.evaluation.plan_coding import PlanCoding, uniform_plan
from sphkv_cli.evaluation.protocol import ReadProtocol, RetentionProtocol, UniformProtocol
from sphkv_cli.evaluation.quantisers import chosen_tiers, uniform_candidates
from sphkv_kernels.tier import TierFormat


@dataclass(frozen=True)
class Work:
    """What one document is put through."""

    candidates: tuple[Candidate, ...]
    protocol: ReadProtocol


WorkOf = Callable[[int], Work]
"""Work for the document with this index in the capture."""


def uniform_work(
    options: EvaluateOptions, books: CodebooksReader | None, shape: ModelCacheShape
) -> WorkOf:
    """The codebooks' tiers and the published methods, the same for every document.

    Raises:
        UsageError: an unknown code, or ",centred" methods without means.
    """
    protocol = UniformProtocol(
        UNIFORM_WINDOW if options.window is None else options.window,
        UNIFORM_FIRST_TOKENS if options.first_tokens is None else options.first_tokens,
        options.first_scored,
    )
    found = uniform_candidates(options, books, shape)
    for candidate in found:
        protocol.check_group(candidate.coding.name, candidate.coding.token_group)
    found.append(Candidate(DenseCoding(shape), False))
    work = Work(tuple(found), protocol)
    return lambda _: work


def beside(work_of: WorkOf, others: Sequence[Candidate]) -> WorkOf:
    """The same with further candidates for every document, before the control, which is last."""

    def work(index: int) -> Work:
        found = work_of(index)
        *planned, control = found.candidates
        return replace(found, candidates=(*planned, *others, control))

    return work


def retention_work(
    options: EvaluateOptions, allocation: AllocationReader, shape: ModelCacheShape
) -> WorkOf:
    """Plan, policy and uniform baselines of each document.

    Raises:
        UsageError: an unknown tier.
    """
    layout = PageLayout(
        tiers=allocation.tiers,
        head_dim=shape.head_dim,
        page_size=allocation.page_size,
        n_kv_heads=shape.n_kv_heads,
        stores_positions=stores_positions(
            [layer.window for layer in allocation.layers], allocation.frames
        ),
        fixed_bytes=fixed_table_bytes(allocation.frames, allocation.tiers),
        position_bytes=position_bytes(max(d.n_tokens for d in allocation.documents)),
    )
    names = tuple(name for name in options.tiers if name != "best")
    chosen = chosen_tiers(names, allocation.tiers, str(allocation.path)) if names else ()
    plans = {info.index: info for info in allocation.documents}

    def work(index: int) -> Work:
        info = plans[index]
        found = [Candidate(coding, True) for coding in _plans(allocation, info, shape)]

        def uniform(tier: TierFormat, sink_page: bool) -> PlanCoding:
            return uniform_plan(
                allocation.tiers.index(tier),
                layout,
                allocation.frames,
                shape,
                info.n_context,
                sink_page=sink_page,
            )

        baselines = [uniform(tier, sink) for tier in chosen for sink in (False, True)]
        if "best" in options.tiers:
            for sink in (False, True):
                fitting = [
                    coding
                    for coding in (uniform(tier, sink) for tier in allocation.tiers)
                    if coding.laid_out_bytes <= info.budget_bytes
                ]
                if fitting:
                    best = max(fitting, key=lambda coding: coding.laid_out_bytes)
                    label = "best uniform tier" + (" + sink page" if sink else "")
                    baselines.append(replace(best, label=label))
        found += [Candidate(coding, False) for coding in baselines]
        found.append(Candidate(DenseCoding(shape), False))
        return Work(tuple(found), RetentionProtocol(info.n_context))

    return work


def _plans(
    allocation: AllocationReader, info: PlanInfo, shape: ModelCacheShape
) -> tuple[PlanCoding, PlanCoding]:
    def coding(label: str, tier_of_token: np.ndarray, n_bytes: int) -> PlanCoding:
        return PlanCoding(label, allocation.tiers, allocation.frames, shape, tier_of_token, n_bytes)

    return (
        coding("plan", allocation.tier_of_token(info), info.laid_out_bytes),
        coding("policy", allocation.policy_tier_of_token(info), info.policy_bytes),
    )
