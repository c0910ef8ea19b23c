"""Rows of a probe after a context that is coded once: the policy, uniform tiers, the dense control.

Each makes its coding for every prompt: a plan is for the tokens of one context.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sphkv_cli.errors import UsageError
from sphkv_cli.evaluation.coding import DenseCoding, KeyValueCoding
from sphkv_cli.evaluation.copy_back import CodingOf
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.options import EvaluateOptions
from sphkv_cli.evaluation.plan_coding import PlanCoding, uniform_plan
from sphkv_cli.evaluation.policy_coding import policy_coding
from sphkv_cli.evaluation.recall_prompts import RecallPrompt
from sphkv_cli.generation.context_policy import ContextPolicy


@dataclass(frozen=True)
class AskedRow:
    """A row to fill: its coding for each prompt."""

    name: str
    is_ours: bool
    coding: KeyValueCoding | CodingOf


def retention_rows(
    options: EvaluateOptions, lengths: Sequence[int], model: JudgedModel, policy: ContextPolicy
) -> list[AskedRow]:
    """The policy, the uniform tiers asked for beside it, and the dense control.

    The best uniform tier has a row where some tier fits the budget at every length.

    Raises:
        UsageError: an unknown tier.
    """
    tiers = policy.layout.tiers
    known = {tier.name: index for index, tier in enumerate(tiers)}
    for name in options.tiers:
        if name != "best" and name not in known:
            raise UsageError(f"there is no tier {name!r}", f"one of {', '.join(known)}, or best")

    def of_policy(prompt: RecallPrompt) -> PlanCoding:
        return policy_coding(model, policy, prompt.token_ids[: prompt.n_context])

    def uniform(tier: int, prompt: RecallPrompt, sink_page: bool) -> PlanCoding:
        n_context = prompt.n_context
        return uniform_plan(
            tier, policy.layout, policy.frames, model.shape, n_context, sink_page=sink_page
        )

    def uniform_bytes(n_context: int, tier: int, sink_page: bool) -> int:
        options = np.full(
            (model.shape.n_layers, model.shape.n_kv_heads, policy.layout.n_pages(n_context)),
            tier + 1,
            dtype=np.int8,
        )
        if sink_page:
            options[:, :, 0] = len(tiers)
        return policy.layout.measure(options, n_context).total

    def best_tier(n_context: int, sink_page: bool) -> int | None:
        budget = policy.budget_bytes(n_context)
        sizes = [uniform_bytes(n_context, tier, sink_page) for tier in range(len(tiers))]
        fitting = [tier for tier, size in enumerate(sizes) if size <= budget]
        return max(fitting, key=lambda tier: sizes[tier]) if fitting else None

    def best(prompt: RecallPrompt, sink_page: bool) -> PlanCoding:
        tier = best_tier(prompt.n_context, sink_page)
        assert tier is not None, "rows are made where some tier fits every length"
        return uniform(tier, prompt, sink_page)

    rows = [AskedRow("policy", True, of_policy)]
    for name in options.tiers:
        for sink_page in (False, True):
            label = ("best uniform tier" if name == "best" else f"uniform {name}") + (
                " + sink page" if sink_page else ""
            )
            coding: CodingOf
            if name == "best":
                if any(best_tier(n_context, sink_page) is None for n_context in lengths):
                    continue
                coding = _bind_best(best, sink_page)
            else:
                coding = _bind(uniform, known[name], sink_page)
            rows.append(AskedRow(label, False, coding))
    rows.append(AskedRow("dense", False, DenseCoding(model.shape)))
    return rows


def _bind(
    uniform: Callable[[int, RecallPrompt, bool], PlanCoding], tier: int, sink_page: bool
) -> CodingOf:
    return lambda prompt: uniform(tier, prompt, sink_page)


def _bind_best(best: Callable[[RecallPrompt, bool], PlanCoding], sink_page: bool) -> CodingOf:
    return lambda prompt: best(prompt, sink_page)
