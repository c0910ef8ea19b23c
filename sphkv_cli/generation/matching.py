"""Does this artifact belong to this model: its digest, its RoPE, its layers, one by one.

Everything that could make a cache wrong without failing is compared before the first token.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sphkv_cli.artifacts.allocation import AllocationReader
from sphkv_cli.artifacts.capture_info import LayerInfo
from sphkv_cli.artifacts.codebooks import CodebooksReader
from sphkv_cli.artifacts.store import require_unchanged
from sphkv_cli.errors import ArtifactError, UsageError
from sphkv_cli.generation.budget_keeper import BudgetKeeper, schedule_of
from sphkv_cli.generation.context_policy import ContextPolicy
from sphkv_cli.generation.placement import PolicyRule, UniformRule
from sphkv_cli.models.digest import model_digest
from sphkv_cli.models.geometry import ModelGeometry, inspect_model, rope_description
from sphkv_kernels.tier import TierFormat


def policy_for(
    path: Path,
    model: Any,
    window: int | None,
    budget: str | None = None,
    shrink: Sequence[tuple[int, float]] = (),
) -> PolicyRule:
    """The policy of an allocation of this very model; with a budget, one that it keeps.

    Raises:
        ArtifactError: the file is damaged, was changed, or is for another model, RoPE or layers.
        UsageError: its score looks at the future; a negative window; a budget that cannot be kept.
        SphkvError: the model's attention cannot be listened to.
    """
    require_unchanged(path)
    geometry, _ = inspect_model(model)
    with AllocationReader(path) as allocation:
        info = allocation.info
        shape = (info.n_layers, info.n_q_heads, info.n_kv_heads, info.head_dim)
        _require_shape(path, shape, geometry)
        require_rope(path, info.rope, model)
        require_layers(path, allocation.layers, geometry)
        _require_digest(path, info.model, info.model_digest, model)
        policy = ContextPolicy.of(allocation, geometry.max_tokens, budget)
        if budget is None:
            if shrink:
                raise UsageError("without a budget there is none to shrink", "pass budget=")
            return PolicyRule.of(policy, window)
        if any(layer.window for layer in geometry.layers):
            raise UsageError(
                "pages of a sliding window come and go with it, no budget is kept of them",
                "leave the budget away",
            )
        schedule = schedule_of(policy.planner.budget, policy.layout, shrink)
        return PolicyRule.of(policy, window, BudgetKeeper.of(policy.planner, schedule))


def uniform_for(
    path: Path, tier: str, model: Any, page_size: int, window: int, first_tokens: int
) -> UniformRule:
    """One tier of codebooks of this very model.

    Raises:
        ArtifactError: as `policy_for`.
        UsageError: an unknown tier; first tokens that do not fit a page.
        SphkvError: the model's attention cannot be listened to.
    """
    require_unchanged(path)
    books = CodebooksReader.open(path)
    geometry, _ = inspect_model(model)
    found = books.shape
    shape = (found.n_layers, geometry.n_q_heads, found.n_kv_heads, found.head_dim)
    _require_shape(path, shape, geometry)
    _require_digest(path, found.model, found.model_digest, model)
    known = {t.name: t for t in (*books.tiers, TierFormat.int8(), TierFormat.dense())}
    if tier not in known:
        raise UsageError(f"{path} has no tier {tier!r}", f"one of {', '.join(known)}")
    return UniformRule.of(
        known[tier], books.frames, page_size=page_size, window=window, first_tokens=first_tokens
    )


def require_layers(path: Path, layers: Sequence[LayerInfo], geometry: ModelGeometry) -> None:
    """Refuse layers with another window, scale or soft cap; raises ArtifactError."""
    for index, (known, found) in enumerate(zip(layers, geometry.layers, strict=True)):
        for name in ("window", "softmax_scale", "logit_softcap"):
            expected, has = getattr(known, name), getattr(found, name)
            if not np.isclose(expected, has, rtol=1e-6, atol=0):
                raise ArtifactError(
                    f"{path} is for {name} {expected:g} in layer {index}, the model has {has:g}",
                    "capture, fit and allocate this model",
                )


def require_rope(path: Path, rope: Mapping[str, Any], model: Any) -> None:
    """Refuse other rotary frequencies or factors; raises ArtifactError."""
    found = rope_description(model)
    for entry in ("inv_freq", "attention_scaling"):
        expected, has = rope.get(entry, {}), found[entry]
        same = expected.keys() == has.keys() and all(
            np.shape(expected[kind]) == np.shape(has[kind])
            and np.allclose(expected[kind], has[kind], rtol=1e-5, atol=0)
            for kind in has
        )
        if not same:
            raise ArtifactError(
                f"{path} is for another RoPE ({entry} differs), its keys are turned otherwise",
                "capture, fit and allocate the model with this RoPE",
            )


def _require_shape(path: Path, shape: tuple[int, ...], geometry: ModelGeometry) -> None:
    found = (geometry.n_layers, geometry.n_q_heads, geometry.n_kv_heads, geometry.head_dim)
    if found != shape:
        raise ArtifactError(
            f"{path} is for (layers, query heads, KV heads, head_dim) {shape}, the model has "
            f"{found}",
            "capture, fit and allocate this model",
        )


def _require_digest(path: Path, name: str, digest: str, model: Any) -> None:
    found = model_digest(model)
    if found != digest:
        raise ArtifactError(
            f"{path} is for {name} (model digest {digest[:12]}), the loaded model has {found[:12]}",
            "load the model that was captured, or capture this one",
        )
