"""A planned context as a cache: every token of every head in its own tier, or dropped.

    khat_t = c + A^-1 S^T Q_tier(t)(S A (k_t - c))  where tier(t) is kept, nothing where it is not

Source: frames and plans, ours; retention, Spherical KV (arXiv 2605.18856).
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sphkv_cli.allocation.layout import PageLayout, tier_bits
from sphkv_cli.evaluation.coding import CodedTokens, KeyValueCoding, ModelCacheShape
from sphkv_cli.evaluation.frame_coding import through
from sphkv_codebooks.frame import FrameSet
from sphkv_kernels.tier import DROPPED, TierFormat


@dataclass(frozen=True, eq=False)
class PlanCoding(KeyValueCoding):
    """One plan of one document.

    tier_of_token: (n_layers, n_kv_heads, n_context) index into tiers, -1 = dropped.
    laid_out_bytes: of the whole plan, fixed tables included.
    """

    label: str
    tiers: tuple[TierFormat, ...]
    frames: FrameSet
    shape: ModelCacheShape
    tier_of_token: npt.NDArray[np.int8]
    laid_out_bytes: int

    def __post_init__(self) -> None:
        heads = (self.shape.n_layers, self.shape.n_kv_heads)
        if self.tier_of_token.shape[:2] != heads:
            raise ValueError(f"a plan of {self.tier_of_token.shape} is not for heads {heads}")
        low, high = int(self.tier_of_token.min()), int(self.tier_of_token.max())
        if low < DROPPED or high >= len(self.tiers):
            raise ValueError(f"a plan names tiers {low}..{high}, there are {len(self.tiers)}")

    @property
    def name(self) -> str:
        return self.label

    def renamed(self, label: str) -> "PlanCoding":
        """The same under another name."""
        return replace(self, label=label)

    @property
    def token_group(self) -> int:
        return 1

    def code(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> CodedTokens:
        # (n_context, n_kv_heads), the order of keys.
        tier_of = torch.from_numpy(self.tier_of_token[layer].astype(np.int64).T).to(keys.device)
        if tier_of.shape[0] != keys.shape[0]:
            raise ValueError(f"a plan of {tier_of.shape[0]} tokens for {keys.shape[0]}")
        framed_keys = self.frames.keys_to_frame(layer, keys, positions)
        framed_values = self.frames.values_to_frame(values)
        # What is dropped is masked; NaN there would show at once if it were read.
        coded_keys = torch.full_like(keys, torch.nan)
        coded_values = torch.full_like(values, torch.nan)
        for index, tier in enumerate(self.tiers):
            chosen = tier_of == index
            if bool(chosen.any()):
                coded_keys[chosen] = through(tier.key_format, framed_keys[chosen])
                coded_values[chosen] = through(tier.value_format, framed_values[chosen])
        kept = tier_of != DROPPED
        coded_keys = self.frames.keys_from_frame(layer, coded_keys, positions)
        coded_values = self.frames.output_from_frame(coded_values)
        # sdpa multiplies a masked value by an exact zero, which NaN would survive.
        gone = ~kept[..., None]
        return CodedTokens(coded_keys.masked_fill(gone, 0), coded_values.masked_fill(gone, 0), kept)

    def code_rate(self, n_tokens: int) -> float:
        bits = np.array([tier_bits(tier, self.shape.head_dim) for tier in self.tiers] + [0.0])
        n_context = self.tier_of_token.shape[2]
        return float(bits[self.tier_of_token].sum() / self.shape.n_coordinates(n_context))

    def stored_bytes(self, n_tokens: int) -> int:
        return self.laid_out_bytes

    def table_bytes(self) -> int:
        # Already inside the plan's bytes.
        return 0


def uniform_plan(
    tier: int,
    layout: PageLayout,
    frames: FrameSet,
    shape: ModelCacheShape,
    n_context: int,
    *,
    sink_page: bool,
) -> PlanCoding:
    """Every page in one tier; with `sink_page`, the first page in the largest tier instead."""
    n_pages = layout.n_pages(n_context)
    options = np.full((shape.n_layers, shape.n_kv_heads, n_pages), tier + 1, dtype=np.int8)
    name = layout.tiers[tier].name
    if sink_page:
        options[:, :, 0] = len(layout.tiers)
        name += " + sink page"
    tier_of_page = options - np.int8(1)
    return PlanCoding(
        label=f"uniform {name}",
        tiers=layout.tiers,
        frames=frames,
        shape=shape,
        tier_of_token=np.repeat(tier_of_page, layout.page_size, axis=2)[:, :, :n_context],
        laid_out_bytes=layout.measure(options, n_context).total,
    )
