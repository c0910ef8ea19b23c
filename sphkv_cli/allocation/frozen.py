"""Everything an allocation froze, for planning other text of the same model at any budget.

Calibration, prices, the score and what quotas are fitted from come from the fit documents and
stay; a document of any length is measured anew (`measure.py`) and planned with them.  Source: ours.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sphkv_cli.allocation.budget import Budget
from sphkv_cli.allocation.calibration import CalibrationTables
from sphkv_cli.allocation.coding import TierFormats
from sphkv_cli.allocation.estimator_store import stored_estimator
from sphkv_cli.allocation.estimators import UtilityEstimator
from sphkv_cli.allocation.layout import (
    PageLayout,
    fixed_table_bytes,
    position_bytes,
    stores_positions,
)
from sphkv_cli.allocation.page_costs import Coefficients
from sphkv_cli.allocation.pins import Pins
from sphkv_cli.allocation.planning import Planner
from sphkv_cli.allocation.policy import QuotaPolicy
from sphkv_cli.allocation.quota_fit import BudgetPrices, QuotaFit
from sphkv_cli.allocation.stage import AllocationRun
from sphkv_cli.artifacts.allocation import AllocationReader
from sphkv_cli.artifacts.capture_info import LayerInfo
from sphkv_codebooks.frame import FrameSet


@dataclass(frozen=True)
class FrozenAllocation:
    """planner: its budget is that of the fit; head_weights: (n_layers, n_q_heads) float64 F;
    window: last positions of a context whose queries are looked at."""

    planner: Planner
    estimator: UtilityEstimator
    frames: FrameSet
    formats: TierFormats
    layers: tuple[LayerInfo, ...]
    head_weights: Tensor
    window: int

    @staticmethod
    def of(allocation: AllocationReader, longest_context: int) -> "FrozenAllocation":
        """Read an allocation; longest_context: tokens, decides how wide stored positions are.

        Raises:
            ArtifactError: its score is not known, or lacks what it needs.
        """
        info = allocation.info
        estimator = stored_estimator(allocation)
        return FrozenAllocation(
            planner=stored_planner(allocation, longest_context),
            estimator=estimator,
            frames=allocation.frames,
            formats=TierFormats.of(allocation.tiers),
            layers=allocation.layers,
            head_weights=torch.from_numpy(allocation.head_weights.astype(np.float64)),
            window=info.window,
        )

    @staticmethod
    def fitted(run: AllocationRun, planner: Planner) -> "FrozenAllocation":
        """Of a run of the stage and what it fitted."""
        return FrozenAllocation(
            planner=planner,
            estimator=run.estimator,
            frames=run.frames,
            formats=run.formats,
            layers=tuple(run.capture.layers),
            head_weights=run.head_weights,
            window=run.options.window,
        )

    def at(self, budget: Budget, n_context: int) -> "FrozenAllocation":
        """The same for another budget of a context of n_context tokens, as `Planner.at`."""
        return replace(self, planner=self.planner.at(budget, n_context))


def stored_planner(allocation: AllocationReader, longest_context: int) -> Planner:
    """The planner of an allocation at its own budget; longest_context: tokens, decides how wide
    stored positions are."""
    info, arrays, fit = allocation.info, allocation.calibration, allocation.quota_fit
    return Planner(
        layout=PageLayout(
            tiers=allocation.tiers,
            head_dim=info.head_dim,
            page_size=info.page_size,
            n_kv_heads=info.n_kv_heads,
            stores_positions=stores_positions(
                [layer.window for layer in allocation.layers], allocation.frames
            ),
            fixed_bytes=fixed_table_bytes(allocation.frames, allocation.tiers),
            position_bytes=position_bytes(longest_context),
        ),
        budget=Budget.parse(info.budget),
        coefficients=Coefficients(allocation.drop_coefficients, allocation.code_coefficients),
        calibration=None
        if arrays is None
        else CalibrationTables(arrays.starts, arrays.log_scores, arrays.log_values),
        is_ceiling=bool(info.utility.get("is_ceiling")),
        quotas=QuotaPolicy.from_fractions(allocation.quotas)
        if fit is None
        else QuotaFit(fit.pages, BudgetPrices(fit.rates, fit.drop, fit.code)),
        pins=Pins(info.pin_first, info.pin_last, info.no_drop),
    )
