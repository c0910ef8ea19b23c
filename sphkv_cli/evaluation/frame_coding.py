"""Spherical codes (and int8, dense) inside frames, as a query of the model reads them.

    khat = c_t + A^-1 S^T Q(S A (k - c_t)),   vhat = S^T Q(S v)

with the centring c_t, balancing A and rotation S of `FrameSet`.  Source: frames, ours; codes,
PolarQuant, arXiv 2502.02617.
"""

from dataclasses import dataclass

from torch import Tensor

from sphkv_cli.allocation.layout import ENTRY_BYTES, START_BYTES, fixed_table_bytes, tier_bits
from sphkv_cli.evaluation.coding import CodedTokens, KeyValueCoding, ModelCacheShape
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.pages import page_bytes
from sphkv_kernels.tier import RegionFormat, TierFormat
from sphkv_kernels.vectors import decode_vectors, encode_vectors

PAGE_SIZE = 32


@dataclass(frozen=True)
class FrameCoding(KeyValueCoding):
    """One tier for every token of every layer.

    label: what reports add to the tier's name, such as its rotation seed.
    """

    tier: TierFormat
    frames: FrameSet
    shape: ModelCacheShape
    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.tier.name}{self.label}"

    @property
    def token_group(self) -> int:
        return 1

    def code(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> CodedTokens:
        framed = self.frames.keys_to_frame(layer, keys, positions)
        decoded = through(self.tier.key_format, framed)
        coded = self.frames.keys_from_frame(layer, decoded, positions)
        coded_values = through(self.tier.value_format, self.frames.values_to_frame(values))
        return CodedTokens(coded, self.frames.output_from_frame(coded_values))

    def code_rate(self, n_tokens: int) -> float:
        return tier_bits(self.tier, self.shape.head_dim) / (2 * self.shape.head_dim)

    def stored_bytes(self, n_tokens: int) -> int:
        # Pages hold tokens in order, so that positions follow from the page: none are stored.
        n_pages = -(-n_tokens // PAGE_SIZE)
        per_page = page_bytes(self.tier, self.shape.head_dim, PAGE_SIZE) + ENTRY_BYTES
        heads = self.shape.n_kv_heads * n_pages * per_page + START_BYTES * (
            self.shape.n_kv_heads + 1
        )
        return self.shape.n_layers * heads

    def table_bytes(self) -> int:
        return fixed_table_bytes(self.frames, [self.tier])


def through(region_format: RegionFormat, framed: Tensor) -> Tensor:
    """Vectors in the frame, coded and decoded, in their own dtype."""
    if isinstance(region_format, SphericalCode):
        return region_format.decode(region_format.encode(framed), framed.dtype)
    return decode_vectors(region_format, encode_vectors(region_format, framed)).to(framed.dtype)
