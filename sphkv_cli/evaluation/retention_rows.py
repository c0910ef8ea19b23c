"""One context at one budget, placed by every method: ours, the published ones, and controls.

A method is an order of the tokens of each KV head and an option for each page of that order; its
bytes are those of the page layout, fixed tables included, and never above the budget.  Eviction
methods keep tokens of their own, in bf16: bare bytes, without padding, page table or frames.

    own        joint plan solved for this context; the frozen quotas; oracle (sees the future)
    published  one tier for all (with and without a dense first page), SnapKV, PyramidKV and Ada-KV
               in bf16, SnapKV's tokens in bf16 over a low tier, tiers per head without drops
    controls   what the joint plan is without one of its parts

Where a method leaves a choice (which tier), it gets the one of least predicted cost.  Without a
dense tier there are no eviction methods.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sphkv_cli.allocation.frozen import FrozenAllocation
from sphkv_cli.allocation.layout import LaidOutBytes, PageLayout
from sphkv_cli.allocation.measure import MeasuredDocument
from sphkv_cli.allocation.page_costs import (
    Utilities,
    document_costs,
    option_of_token,
    order_by_score,
    page_of_token,
)
from sphkv_cli.allocation.pins import Pins
from sphkv_cli.allocation.planning import Planner
from sphkv_cli.allocation.published import ada_counts, even_counts, pyramid_counts
from sphkv_cli.allocation.solver import InfeasibleBudgetError, solve_parts
from sphkv_cli.errors import UsageError
from sphkv_cli.evaluation.coding import ModelCacheShape
from sphkv_cli.evaluation.context_measure import MeasuredContext
from sphkv_cli.evaluation.plan_coding import PlanCoding

Kind = Literal["own", "published", "control"]
RowSet = Literal["own", "published", "controls", "all"]
Float = NDArray[np.float64]
Int = NDArray[np.int64]
Options = NDArray[np.int8]

POLICY, PLAN, ORACLE = "policy", "plan", "oracle (ceiling)"
"""Frozen quotas; solved for this context; solved with its true future."""
PIN_FIRST, PIN_LAST = 4, 32
"""Tokens of the control that keeps the ends of the context in the largest tier."""


@dataclass(frozen=True)
class Placed:
    """One method's choice: option_of_page (n_layers, n_kv_heads, n_pages) over order (.., tokens).

    cost: predicted, NaN where the method has no use for it.  evicts: every token is a page of its
    own and kept dense or dropped.  gap: to the dual bound, NaN where nothing was solved.
    """

    name: str
    kind: Kind
    order: Int
    option_of_page: Options
    cost: float
    evicts: bool = False
    gap: float = float("nan")

    def laid_out(self, layout: PageLayout) -> LaidOutBytes:
        """Its bytes by purpose; of eviction methods the kept tokens alone."""
        if self.evicts:
            kept = int(np.count_nonzero(self.option_of_page))
            return LaidOutBytes(kept * dense_token_bytes(layout.head_dim), 0, 0, 0, 0)
        return layout.measure(self.option_of_page, self.order.shape[-1])

    def coding(self, allocation: FrozenAllocation, shape: ModelCacheShape) -> PlanCoding:
        """As a cache."""
        layout = allocation.planner.layout
        pages = page_of_token(self.order, 1 if self.evicts else layout.page_size)
        options = option_of_token(self.option_of_page, pages)
        return PlanCoding(
            self.name,
            layout.tiers,
            allocation.frames,
            shape,
            (options - np.int8(1)).astype(np.int8),
            self.laid_out(layout).total,
        )


def dense_token_bytes(head_dim: int) -> int:
    """Bytes of a key and a value in bf16."""
    return 2 * 2 * head_dim


@dataclass(frozen=True)
class Controls:
    """Planners fitted for the controls on the fit documents, by the name of their score."""

    by_score: dict[str, Planner]


def wanted_kinds(rows: RowSet) -> tuple[Kind, ...]:
    """The kinds of rows that a set names."""
    if rows not in get_args(RowSet):
        raise ValueError(f"no rows {rows!r}")
    kinds: dict[RowSet, tuple[Kind, ...]] = {
        "own": ("own",),
        "published": ("own", "published"),
        "controls": ("own", "control"),
        "all": ("own", "published", "control"),
    }
    return kinds[rows]


def place_all(
    context: MeasuredContext,
    planner: Planner,
    kinds: Sequence[Kind],
    controls: Controls,
) -> list[Placed]:
    """Every method that fits the planner's budget.

    Raises:
        UsageError: the budget is below the metadata or above the dense cache.
    """
    placing = _Placing(context, planner, controls)
    makers: dict[Kind, Callable[[], Iterator[Placed | None]]] = {
        "own": placing.own,
        "published": placing.published,
        "control": placing.control,
    }
    return [placed for kind in kinds for placed in makers[kind]() if placed is not None]


@dataclass(frozen=True)
class _Placing:
    context: MeasuredContext
    planner: Planner
    controls: Controls

    @property
    def n_context(self) -> int:
        return self.context.document.n_context

    @property
    def budget_bytes(self) -> int:
        """Of all pages."""
        layout = self.planner.layout
        resolved = self.planner.budget.resolve(layout.n_coordinates(self.n_context))
        return resolved.n_bytes - layout.overhead_bytes()

    def own(self) -> Iterator[Placed | None]:
        planned = self.planner.plan(self.context.document)
        plan, policy, gap = planned.plan, planned.policy, planned.solution.gap
        yield Placed(PLAN, "own", planned.order, plan.option_of_page, plan.cost, gap=gap)
        yield Placed(POLICY, "own", planned.order, policy.option_of_page, policy.cost)
        document = self.context.document
        assert document.horizon is not None
        seen = replace(document, scores=document.horizon.drop)
        oracle = replace(self.planner, is_ceiling=True, calibration=None)
        yield self._joint(ORACLE, "own", oracle, seen)

    def published(self) -> Iterator[Placed | None]:
        planner, layout = self.planner, self.planner.layout
        planned = planner.plan(self.context.document)
        in_order = self._in_order()
        shape = (layout.n_layers, layout.n_kv_heads)
        for name, baseline in planned.baselines.items():
            pages = np.broadcast_to(
                baseline.option_of_token[:: layout.page_size],
                (*shape, layout.n_pages(self.n_context)),
            )
            yield Placed(name, "published", in_order, pages.copy(), baseline.cost)
        if layout.tiers[-1].kind == "dense":
            yield from self._evicting()
        yield self._tiers_per_head()
        yield self._joint("joint, no drop", "published", planner, self.context.document, first=1)

    def _evicting(self) -> Iterator[Placed | None]:
        """What keeps tokens in bf16: its own tokens alone, or a low tier for the others."""
        planner, layout = self.planner, self.planner.layout
        shape = (layout.n_layers, layout.n_kv_heads)
        snapkv = order_by_score(self.context.snapkv)
        largest, n = len(layout.tiers), self.n_context
        budget = planner.budget.resolve(layout.n_coordinates(n))
        total = budget.n_bytes // dense_token_bytes(layout.head_dim)
        for name, counts in (
            ("SnapKV, bf16", even_counts(total, n, *shape)),
            ("PyramidKV, bf16", pyramid_counts(total, n, *shape)),
            ("Ada-KV, bf16", ada_counts(self.context.snapkv, total)),
        ):
            options = np.where(np.arange(n) < counts[..., None], largest, 0).astype(np.int8)
            yield Placed(name, "published", snapkv, options, float("nan"), evicts=True)
        yield self._snapkv_over_low_tier()

    def control(self) -> Iterator[Placed | None]:
        planner, document = self.planner, self.context.document
        ones = np.ones_like(planner.coefficients.drop)
        c_drop_1 = planner.priced_at(replace(planner.coefficients, drop=ones))
        yield self._joint("joint, c_drop = 1", "control", c_drop_1, document)
        codes = [tier.kind == "spherical" for tier in planner.layout.tiers]
        last = max((i + 1 for i, is_code in enumerate(codes) if is_code), default=0)
        yield self._joint("joint, no top tier", "control", planner, document, last=last)
        raw = replace(planner, calibration=None)
        scored = replace(document, scores=document.window.drop)
        yield self._joint("joint, uncalibrated window", "control", raw, scored)
        for name, fitted in self.controls.by_score.items():
            at_budget = replace(fitted, budget=planner.budget, coefficients=planner.coefficients)
            yield self._joint(
                f"joint, {name} score", "control", at_budget, self.context.scored_by(name)
            )
        yield self._pinned()
        yield self._head_means()

    def _in_order(self) -> Int:
        layout = self.planner.layout
        shape = (layout.n_layers, layout.n_kv_heads, self.n_context)
        return np.broadcast_to(np.arange(self.n_context), shape)

    def _page_costs(self, planner: Planner, utilities: Utilities, order: Int) -> Float:
        return document_costs(
            self.context.document.errors,
            utilities,
            planner.coefficients,
            order,
            planner.layout.page_size,
        ).pages

    def _joint(
        self,
        name: str,
        kind: Kind,
        planner: Planner,
        document: MeasuredDocument,
        *,
        first: int = 0,
        last: int | None = None,
    ) -> Placed | None:
        """Solve with the options first..last of the layout; None where they do not fit."""
        order = order_by_score(document.scores)
        costs = self._page_costs(planner, planner.utilities(document), order)
        return self._solved(name, kind, order, costs, first, last)

    def _solved(
        self, name: str, kind: Kind, order: Int, costs: Float, first: int, last: int | None
    ) -> Placed | None:
        sizes = self.planner.layout.option_bytes()
        allowed = slice(first, None if last is None else last + 1)
        parts = [
            (of_layer.reshape(-1, of_layer.shape[-1])[:, allowed], sizes[layer, allowed])
            for layer, of_layer in enumerate(costs)
        ]
        try:
            found = solve_parts(parts, self.budget_bytes, n_threads=1).plan
        except InfeasibleBudgetError:
            return None
        options = (found.option_of_item + np.int8(first)).reshape(costs.shape[:3])
        return Placed(name, kind, order, options.astype(np.int8), found.cost)

    def _pinned(self) -> Placed | None:
        """The first and last tokens of the context in the largest tier, whatever they score."""
        pinned = replace(self.planner, pins=Pins(PIN_FIRST, PIN_LAST))
        try:
            plan = pinned.solved(self.context.document)
        except UsageError:
            return None
        order = pinned.order(self.context.document.scores)
        name = f"joint, first {PIN_FIRST} and last {PIN_LAST} pinned"
        return Placed(name, "control", order, plan.option_of_page, plan.cost)

    def _head_means(self) -> Placed | None:
        """Every token of a head needs what its mean token needs; pages in order of position."""
        utilities = self.planner.utilities(self.context.document)

        def spread(values: Float) -> Float:
            return np.broadcast_to(values.mean(axis=-1, keepdims=True), values.shape).copy()

        flat = Utilities(spread(utilities.key), spread(utilities.value), spread(utilities.drop))
        order = self._in_order()
        costs = self._page_costs(self.planner, flat, order)
        return self._solved("joint, head means only", "control", order, costs, 0, None)

    def _snapkv_over_low_tier(self) -> Placed | None:
        """The first page and SnapKV's pages in bf16, all others in the best one of the tiers."""
        layout = self.planner.layout
        scores = self.context.snapkv.copy()
        # Above the window's own infinity: the sink page comes first.
        scores[np.isinf(scores)] = np.finfo(np.float64).max
        scores[..., : layout.page_size] = np.inf
        order = order_by_score(scores)
        utilities = self.planner.utilities(self.context.document)
        costs = self._page_costs(self.planner, utilities, order)
        sizes, n_pages = layout.option_bytes(), layout.n_pages(self.n_context)
        heads = (layout.n_layers, layout.n_kv_heads)
        largest = len(layout.tiers)
        found: list[Placed] = []
        for low in range(1, largest):
            base = int(sizes[:, low].sum()) * layout.n_kv_heads * n_pages
            step = int((sizes[:, largest] - sizes[:, low]).max())
            total = (self.budget_bytes - base) // step
            if total < layout.n_layers * layout.n_kv_heads:
                continue
            counts = even_counts(int(total), n_pages, *heads)
            dense = np.arange(n_pages) < counts[..., None]
            options = np.where(dense, largest, low).astype(np.int8)
            cost = np.take_along_axis(costs, options[..., None].astype(np.int64), axis=-1).sum()
            name = "SnapKV in bf16 over low tier + sink page"
            found.append(Placed(name, "published", order, options, float(cost)))
        return min(found, key=lambda placed: placed.cost, default=None)

    def _tiers_per_head(self) -> Placed | None:
        """One tier per (layer, KV head), the first page in the largest; nothing is dropped."""
        layout, order = self.planner.layout, self._in_order()
        utilities = self.planner.utilities(self.context.document)
        costs = self._page_costs(self.planner, utilities, order)
        sizes, largest = layout.option_bytes(), len(layout.tiers)
        n_rest = layout.n_pages(self.n_context) - 1
        sinks = int(sizes[:, largest].sum()) * layout.n_kv_heads
        parts = [
            (of_layer[:, 1:, 1:].sum(axis=1), sizes[layer, 1:] * n_rest)
            for layer, of_layer in enumerate(costs)
        ]
        try:
            plan = solve_parts(parts, self.budget_bytes - sinks, n_threads=1).plan
        except InfeasibleBudgetError:
            return None
        tier = (plan.option_of_item + np.int8(1)).reshape(layout.n_layers, layout.n_kv_heads, 1)
        options = np.repeat(tier, n_rest + 1, axis=2).astype(np.int8)
        options[..., 0] = largest
        cost = plan.cost + float(costs[:, :, 0, largest].sum())
        return Placed("tiers per head + sink page, no drop", "published", order, options, cost)
