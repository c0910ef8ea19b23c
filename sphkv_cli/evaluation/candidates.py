"""Which codings a run evaluates: uniform ones for all documents, or plans for each document."""

import re
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
from sphkv_cli.errors import UsageError
from sphkv_cli.evaluation.coding import DenseCoding, KeyValueCoding, ModelCacheShape
from sphkv_cli.evaluation.frame_coding import FrameCoding
from sphkv_cli.evaluation.options import EvaluateOptions
from sphkv_cli.evaluation.plan_coding import PlanCoding, uniform_plan
from sphkv_cli.evaluation.protocol import ReadProtocol, RetentionProtocol, UniformProtocol
from sphkv_cli.evaluation.published import published_codings
from sphkv_cli.evaluation.sinks import SinksKeptDense
from sphkv_codebooks.sink_rule import SinkRule
from sphkv_kernels.tier import TierFormat

_SEED = re.compile(r", seed \d+$")


@dataclass(frozen=True)
class Candidate:
    """coding; whether gates hold for it; row: rotation seeds of one code share theirs."""

    coding: KeyValueCoding
    is_ours: bool

    @property
    def row(self) -> str:
        """Name of the row that its scores go into."""
        return _SEED.sub("", self.coding.name)


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
    protocol = UniformProtocol(options.window, options.first_tokens, options.first_scored)
    seeds = range(options.seed, options.seed + options.seeds)
    found: list[Candidate] = []
    frames = None
    if books is not None:
        frames = books.frames
        sinks = _sinks(options, books)
        for tier in _chosen_tiers(options.codes, books.tiers, str(books.path)):
            for coding in _with_seeds(tier, books, shape, options.seeds):
                protected = coding if sinks is None else SinksKeptDense(coding, sinks)
                found.append(Candidate(protected, True))
    elif options.codes:
        raise UsageError(f"--code {options.codes[0]} needs codebooks", "pass codebooks.h5")
    is_centred = frames is not None and frames.key_mean is not None
    if not is_centred and any(name.endswith(",centred") for name in options.methods):
        raise UsageError(
            "centred methods need key means",
            "pass codebooks fitted with --centring auto, post_rope or pre_rope",
        )
    published = published_codings(options.methods, shape, frames, seeds)
    found += [Candidate(coding, False) for coding in published]
    for candidate in found:
        protocol.check_group(candidate.coding.name, candidate.coding.token_group)
    found.append(Candidate(DenseCoding(shape), False))
    work = Work(tuple(found), protocol)
    return lambda _: work


def _sinks(options: EvaluateOptions, books: CodebooksReader) -> SinkRule | None:
    """The rule of the codebooks, with the factor asked for; None where it finds nothing."""
    rule = books.sinks
    if rule is None:
        if options.sinks != "auto" and options.sinks > 0:
            raise UsageError(
                f"{books.path} holds no norms to find sinks by",
                "make it again with `sphkv fit-codebooks`, or pass --sinks 0",
            )
        return None
    if options.sinks != "auto":
        rule = replace(rule, factor=options.sinks)
    return rule if rule.factor > 0 else None


def _with_seeds(
    tier: TierFormat, books: CodebooksReader, shape: ModelCacheShape, n_seeds: int
) -> list[KeyValueCoding]:
    frames = books.frames
    if n_seeds == 1 or frames.rotation.kind == "none":
        return [FrameCoding(tier, frames, shape)]
    first = frames.rotation
    rotations = [first] + [
        replace(first, seed=first.seed + step, stored_matrix=None) for step in range(1, n_seeds)
    ]
    return [
        FrameCoding(tier, replace(frames, rotation=rotation), shape, f", seed {rotation.seed}")
        for rotation in rotations
    ]


def _chosen_tiers(
    names: Sequence[str], tiers: Sequence[TierFormat], path: str
) -> tuple[TierFormat, ...]:
    known = {tier.name: tier for tier in tiers}
    for name in names:
        if name not in known:
            raise UsageError(f"{path} has no tier {name!r}", f"one of {', '.join(known)}")
    return tuple(tier for tier in tiers if not names or tier.name in names)


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
    chosen = _chosen_tiers(names, allocation.tiers, str(allocation.path)) if names else ()
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
