"""A budget that holds while a coded cache grows: what new pages get, and which older ones give.

When pages are due, every sequence's `GrowingAllocation` decides about its pages of all layers and
heads together: new ones enter in the option that pays, sealed ones only lose precision or are
dropped.  What a page costs in a tier is what a page of its rank cost the fit documents
(`allocation/quota_fit.py`); of a page that came after the prompt no rank is known, so it costs what
their pages cost on average, but the first, which holds the sink.

The budget pays for sealed tokens, page table and fixed tables included; the dense window comes on
top.  `budget_seal.py` does what is decided here.  Source: ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from sphkv_cli.allocation.budget import Budget
from sphkv_cli.allocation.layout import PageLayout
from sphkv_cli.allocation.pins import Pins
from sphkv_cli.allocation.planning import Planner
from sphkv_cli.allocation.quota_fit import QuotaFit, priced, stretched
from sphkv_cli.errors import SphkvError, UsageError
from sphkv_cli.generation.placed_tokens import Placement
from sphkv_cli.growing.allocation import GrowingAllocation, GrowthStep
from sphkv_cli.growing.schedule import BudgetSchedule

Ids = npt.NDArray[np.int64]
_MANY_TOKENS = 1 << 20


def schedule_of(
    budget: Budget, layout: PageLayout, shrink: Sequence[tuple[int, float]]
) -> BudgetSchedule:
    """Bytes of pages by sealed tokens; shrink: from so many tokens on times so much.

    Raises:
        UsageError: a factor outside (0, 1].
    """
    try:
        if budget.unit == "bytes":
            # More per token than any page takes: only the limit counts.
            most = 4.0 * layout.n_coordinates(1) + budget.amount
            return BudgetSchedule(most, int(budget.amount), tuple(shrink))
        whole = budget.resolve(layout.n_coordinates(_MANY_TOKENS)).n_bytes
        return BudgetSchedule(whole / _MANY_TOKENS, None, tuple(shrink))
    except ValueError as error:
        raise UsageError(
            f"the budget cannot shrink so: {error}", "give factors in (0, 1]"
        ) from error


@dataclass
class _Sequence:
    """One sequence's pages: ids[layer][head] of the growth's pages, in the order of entries."""

    growth: GrowingAllocation
    ids: list[list[Ids]]
    n_tokens: int


@dataclass(eq=False)
class BudgetKeeper:
    """Use: `start` when prompts have been placed, then `place` at every seal.

    curves: as `QuotaFit.pages`, priced for the budget.
    """

    layout: PageLayout
    schedule: BudgetSchedule
    curves: tuple[npt.NDArray[np.float64], ...]
    _sequences: list[_Sequence] = field(default_factory=list)
    _is_lost: bool = False

    @staticmethod
    def of(planner: Planner, schedule: BudgetSchedule) -> "BudgetKeeper":
        """Of an allocation's planner, at its budget.

        Raises:
            UsageError: it keeps no costs, it pins tokens, or its fixed tables take the budget.
        """
        if planner.pins != Pins():
            raise UsageError(
                "the allocation pins tokens or drops none, which a growing budget does not keep",
                "allocate without --pin-first, --pin-last and --no-drop, or leave the budget away",
            )
        if not isinstance(planner.quotas, QuotaFit):
            raise UsageError(
                "the allocation keeps no costs of pages, which a growing cache decides by",
                "run sphkv allocate again",
            )
        tables = planner.layout.overhead_bytes()
        if schedule.at_most_bytes is not None and schedule.budget_bytes(_MANY_TOKENS) <= tables:
            raise UsageError(
                f"a budget of {schedule.budget_bytes(_MANY_TOKENS):,} bytes leaves nothing beside "
                f"the plan's {tables:,} bytes of tables",
                "give a larger one" + (", or shrink it less" if schedule.factors else ""),
            )
        curves = tuple(priced(pages, planner.coefficients) for pages in planner.quotas.pages)
        return BudgetKeeper(planner.layout, schedule, curves)

    def fresh(self) -> "BudgetKeeper":
        """The same budget for another cache: no sequence is known."""
        return BudgetKeeper(self.layout, self.schedule, self.curves)

    def forget(self) -> None:
        """No sequence is known."""
        self._sequences, self._is_lost = [], False

    def lose(self) -> None:
        """A seal failed after its pages were decided: only `forget` helps."""
        self._is_lost = True

    def require_known(self) -> None:
        """Raise SphkvError if the last seal failed."""
        if self._is_lost:
            raise SphkvError(
                "the cache no longer knows its pages, a seal before this one failed",
                "reset it and read the prompt again",
            )

    @property
    def is_started(self) -> bool:
        """Whether prompts have been placed."""
        return bool(self._sequences)

    def can_begin(self, n_tokens: int) -> bool:
        """Whether so many first tokens may be sealed: not while the tables eat their budget.

        A budget in bytes does not grow with the tokens, so it never waits.
        """
        tables = self.layout.overhead_bytes()
        is_absolute = self.schedule.at_most_bytes is not None
        return is_absolute or self.schedule.budget_bytes(n_tokens) >= 2 * tables

    @property
    def first_tokens(self) -> int:
        """The fewest tokens of which some may be sealed, before the budget shrinks."""
        if self.can_begin(0):
            return 0
        return math.ceil(2 * self.layout.overhead_bytes() / self.schedule.per_token_bytes)

    def limit(self, n_tokens: int) -> int:
        """Bytes of pages that n_tokens sealed tokens may take; 0 where the tables take all."""
        return max(self.schedule.budget_bytes(n_tokens) - self.layout.overhead_bytes(), 0)

    def start(
        self, options: Sequence[npt.NDArray[np.int8] | None], n_tokens: Sequence[int]
    ) -> None:
        """Sequences whose prompts were placed.

        Args:
            options: per sequence (n_layers, n_kv_heads, n_pages) by falling score; None: nothing
                of it is sealed yet.
            n_tokens: sealed.
        """
        self._sequences = []
        heads = (self.layout.n_layers, self.layout.n_kv_heads)
        for placed, n in zip(options, n_tokens, strict=True):
            growth = GrowingAllocation(1 + len(self.layout.tiers))
            ids = [[np.zeros(0, np.int64) for _ in range(heads[1])] for _ in range(heads[0])]
            if placed is not None:
                n_pages = placed.shape[2]
                ranked = [stretched(pages, n_pages) for pages in self.curves]
                costs = np.mean(ranked, axis=0).reshape(-1, growth.n_options)
                own = placed.reshape(-1, 1).astype(np.int64)
                # The quotas' choice stands, also where on average a smaller option costs no more.
                least = np.take_along_axis(costs, own, 1) * (1 + 1e-9) + 1e-300
                is_smaller = np.arange(growth.n_options) < own
                costs = np.where(is_smaller, np.maximum(costs, least), costs)
                sizes = self._sizes(n_pages)
                used = int(np.take_along_axis(sizes, own, 1).sum())
                step = growth.append(costs, sizes, used, at_most=placed.ravel())
                assert np.array_equal(step.options, placed.ravel())
                numbers = np.arange(placed.size).reshape(placed.shape)
                for layer, head in np.ndindex(heads):
                    ids[layer][head] = _in_order(numbers[layer, head], placed[layer, head])
            self._sequences.append(_Sequence(growth, ids, n))

    def place(self, s: int, n_pages: int) -> tuple[list[Placement], dict[tuple[int, int], int]]:
        """What becomes of n_pages new pages of every head of sequence s, and of those before.

        n_pages may be 0: the budget may be another than the prompt was placed for.

        Returns:
            a placement per layer; option by (layer, entry of this sequence) for pages that move.
        """
        sequence, layout = self._sequences[s], self.layout
        heads, n_options = (layout.n_layers, layout.n_kv_heads), sequence.growth.n_options
        mean = np.mean(
            [pages[:, :, min(1, pages.shape[2] - 1) :].mean(2) for pages in self.curves], 0
        )
        costs = np.broadcast_to(mean[:, :, None], (*heads, n_pages, n_options))
        sequence.n_tokens += n_pages * layout.page_size
        step = sequence.growth.append(
            costs.reshape(-1, n_options), self._sizes(n_pages), self.limit(sequence.n_tokens)
        )
        moved = self._moved(sequence, step)
        options = step.options.reshape(*heads, n_pages)
        numbers = step.first_page + np.arange(options.size).reshape(options.shape)
        placements = []
        for layer in range(heads[0]):
            for head in range(heads[1]):
                new = _in_order(numbers[layer, head], options[layer, head])
                sequence.ids[layer][head] = np.concatenate([sequence.ids[layer][head], new])
            placements.append(_placement(options[layer], layout.page_size))
        return placements, moved

    def _moved(self, sequence: _Sequence, step: GrowthStep) -> dict[tuple[int, int], int]:
        """Entries by the order before the step; dropped pages leave `ids`."""
        after = {one.page: one.after for one in step.demotions}
        moved: dict[tuple[int, int], int] = {}
        for layer, heads in enumerate(sequence.ids):
            first = 0
            for head, ids in enumerate(heads):
                hit = np.flatnonzero(np.isin(ids, list(after))) if after else np.zeros(0, int)
                for place in hit.tolist():
                    moved[layer, first + place] = after[int(ids[place])]
                gone = [p for p in hit.tolist() if after[int(ids[p])] == 0]
                heads[head] = np.delete(ids, gone)
                first += ids.size
        return moved

    def _sizes(self, n_pages: int) -> npt.NDArray[np.int64]:
        """(n_layers n_kv_heads n_pages, n_options) bytes."""
        layout = self.layout
        sizes = layout.option_bytes()[:, None, None]
        shape = (layout.n_layers, layout.n_kv_heads, n_pages, sizes.shape[-1])
        return np.broadcast_to(sizes, shape).reshape(-1, sizes.shape[-1])


def _in_order(ids: Ids, options: npt.NDArray[np.int8]) -> Ids:
    """The kept of one head's new pages, as a page table orders them: by tier, then by number."""
    chosen = np.flatnonzero(options > 0)
    ordered: Ids = ids[chosen[np.argsort(options[chosen], kind="stable")]]
    return ordered


def _placement(options: npt.NDArray[np.int8], page_size: int) -> Placement:
    """options: (n_kv_heads, n_pages), of tokens in order."""
    tiers = torch.from_numpy((options.T - np.int8(1)).copy())
    numbers = torch.arange(options.shape[1], dtype=torch.int32)
    return Placement(
        tiers.repeat_interleave(page_size, dim=0),
        numbers.repeat_interleave(page_size)[:, None].expand(-1, options.shape[0]),
    )
