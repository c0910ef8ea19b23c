"""An allocation's policy on a context that nobody planned: scores, order, quotas, pages.

    order = tokens by falling score of (layer, KV head);  page = rank // page_size
    tier(page) = quotas of the budget and of n_context tokens (`allocation/quota_fit.py`)

The quotas depend on the number of tokens alone, the order on the layer's own window of queries:
a layer is placed as soon as its context has been attended to.  Source: ours.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sphkv_cli.allocation.attention_utility import LayerGeometry
from sphkv_cli.allocation.budget import Budget
from sphkv_cli.allocation.context import LayerContext, Split
from sphkv_cli.allocation.estimators import UtilityEstimator
from sphkv_cli.allocation.frozen import stored_planner
from sphkv_cli.allocation.layout import PageLayout
from sphkv_cli.allocation.page_costs import option_of_token, page_of_token
from sphkv_cli.allocation.planning import Planner
from sphkv_cli.artifacts.allocation import AllocationReader
from sphkv_cli.artifacts.allocation_content import AllocationInfo
from sphkv_cli.artifacts.capture_info import LayerInfo
from sphkv_cli.errors import SphkvError, UsageError
from sphkv_codebooks.frame import FrameSet

_QUERY_STRIDE = 4


@dataclass(frozen=True, eq=False)
class ContextPolicy:
    """What an allocation froze, apart from its file.

    head_weights: (n_layers, n_q_heads) float64.
    """

    info: AllocationInfo
    layers: tuple[LayerInfo, ...]
    frames: FrameSet
    planner: Planner
    estimator: UtilityEstimator
    head_weights: Tensor
    _options: dict[int, npt.NDArray[np.int8]] = field(default_factory=dict, init=False, repr=False)

    @staticmethod
    def of(
        allocation: AllocationReader, longest_context: int, budget: str | None = None
    ) -> "ContextPolicy":
        """Read everything the policy needs.

        longest_context: tokens, decides how wide stored positions are; budget: another than the
        allocation's own.

        Raises:
            UsageError: the budget cannot be read, or the score looks at the future, which a new
                text does not have.
        """
        from sphkv_cli.allocation.estimator_store import stored_estimator

        info = allocation.info
        estimator = stored_estimator(allocation)
        if estimator.is_ceiling:
            raise UsageError(
                f"{allocation.path} scores tokens by {estimator.name}, which looks at the future",
                "allocate with another --utility",
            )
        planner = stored_planner(allocation, longest_context)
        if budget is not None:
            planner = planner.at(Budget.parse(budget), longest_context)
        return ContextPolicy(
            info=info,
            layers=allocation.layers,
            frames=allocation.frames,
            planner=planner,
            estimator=estimator,
            head_weights=torch.from_numpy(allocation.head_weights.astype(np.float64)),
        )

    @property
    def layout(self) -> PageLayout:
        """Of its pages."""
        return self.planner.layout

    def budget_bytes(self, n_context: int) -> int:
        """Bytes that the budget gives a context of so many tokens."""
        return self.planner.budget.resolve(self.layout.n_coordinates(n_context)).n_bytes

    def can_place(self, n_context: int) -> bool:
        """Whether the budget of so short a context covers its fixed tables twice, and its pins.

        Below that the tables eat the budget and next to nothing would be kept.
        """
        pinned = self.planner.pins.minimum_bytes(self.layout, n_context)
        return self.budget_bytes(n_context) >= max(2 * self.layout.overhead_bytes(), pinned)

    def options_of_pages(self, n_context: int) -> npt.NDArray[np.int8]:
        """(n_layers, n_kv_heads, n_pages) option of each page by falling score; 0 drops.

        Raises:
            SphkvError: the budget of n_context tokens is below their metadata or what is pinned.
        """
        found = self._options.get(n_context)
        if found is None:
            budget = self.budget_bytes(n_context) - self.layout.overhead_bytes()
            if budget < 0:
                raise SphkvError(
                    f"the budget {self.planner.budget.text} of {n_context} tokens is below the "
                    f"{self.layout.overhead_bytes():,} bytes of their fixed tables",
                    "give a longer context",
                )
            self.planner.pins.require(
                self.layout, n_context, self.budget_bytes(n_context), f"{n_context} tokens"
            )
            found = self.planner.options_of_pages(n_context)
            self._options[n_context] = found
        return found

    def laid_out_bytes(self, n_context: int) -> int:
        """Bytes of a placed context, fixed tables included."""
        return self.layout.measure(self.options_of_pages(n_context), n_context).total

    def asked_tokens(self, n_context: int) -> Tensor:
        """(n) int64, ascending: the context's tokens whose queries `place` wants.

        Those of the window; where the score looks at all queries, also one in _QUERY_STRIDE before.
        """
        start = max(n_context - self.info.window, 0)
        before = torch.arange(0, start, _QUERY_STRIDE)
        if not self.estimator.reads_all_queries:
            before = before[:0]
        return torch.cat([before, torch.arange(start, n_context)])

    def place(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tier (-1 drops) and page of each token of one layer.

        Args:
            queries: (n, n_q_heads, head_dim), those of `asked_tokens`.
            keys, values: (n_context, n_kv_heads, head_dim), dense, after RoPE.
            positions: (n_context) int64, one after the other.

        Returns:
            tier_of_token int8, page_of_token int32: (n_context, n_kv_heads), on the CPU.
        """
        n_context = keys.shape[0]
        scores = self.scores(layer, queries, keys, values, positions)
        order = self.planner.order(scores[None])
        pages = page_of_token(order, self.layout.page_size)
        options = option_of_token(self.options_of_pages(n_context)[layer][None], pages)
        tiers = torch.from_numpy((options[0] - np.int8(1)).T.copy())
        return tiers, torch.from_numpy(pages[0].T.copy())

    def scores(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor
    ) -> npt.NDArray[np.float64]:
        """(n_kv_heads, n_context): `place` orders by it; arguments as there."""
        info, n_context = self.layers[layer], keys.shape[0]
        asked = self.asked_tokens(n_context)
        if queries.shape[0] != asked.numel():
            raise ValueError(f"{queries.shape[0]} queries, {asked.numel()} were asked for")
        n_window = min(self.info.window, n_context)
        # How far the future reaches is part of the score of a windowed layer; its keys are not.
        future = torch.zeros((self.info.horizon, *keys.shape[1:]), dtype=keys.dtype)
        # What the estimators make anew lies where the keys lie.
        with torch.device(keys.device):
            future = future.to(keys.device)
            context = LayerContext(
                layer=layer,
                split=Split(
                    n_context,
                    slice(asked.numel() - n_window, asked.numel()),
                    slice(asked.numel(), asked.numel()),
                ),
                geometry=LayerGeometry(info.softmax_scale, info.window, info.logit_softcap),
                head_weights=self.head_weights[layer].to(keys.device),
                positions=asked.to(keys.device),
                queries=queries,
                keys=torch.cat([keys, future]),
                values=torch.cat([values, future]),
                queries_framed=self.frames.queries_to_frame(layer, queries),
                keys_framed=self.frames.keys_to_frame(layer, keys, positions),
                values_framed=self.frames.values_to_frame(values),
            )
            found: npt.NDArray[np.float64] = self.estimator.score(context).cpu().numpy()
        return found
