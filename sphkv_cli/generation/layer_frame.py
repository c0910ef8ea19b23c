"""A layer's frame as matrices on the model's device, for queries and outputs of every step.

    q' = q M_h,   offset = q . mu_h,   (a, b) = q W_h,   o = o' S        all linear in q or o'

read off `FrameSet` by sending it the identity, so that there is one definition of a frame.
Source: ours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_codebooks.frame import FrameSet
from sphkv_kernels.position_term import PositionTerm


@dataclass(frozen=True, eq=False)
class LayerFrame:
    """query: (n_q_heads or 1, d, d); offset: (n_q_heads, d) or None; output: (d, d).

    position: (n_q_heads, d, 2, n_pairs) with frequencies (n_kv_heads, n_pairs), or None.
    """

    query: Tensor
    output: Tensor
    offset: Tensor | None
    position: Tensor | None
    frequencies: Tensor | None

    @staticmethod
    def of(
        frames: FrameSet, layer: int, n_q_heads: int, device: torch.device, dtype: torch.dtype
    ) -> "LayerFrame":
        """One layer's matrices."""
        d = frames.head_dim
        eye = torch.eye(d, dtype=torch.float64)
        per_head = eye[:, None].expand(d, n_q_heads, d)
        query = frames.queries_to_frame(layer, per_head).transpose(0, 1)
        if frames.balancing is None:
            query = query[:1]
        offset = None
        constant = frames.logit_offset(layer, per_head)
        if bool(constant.any()):  # after RoPE, or what a truncated mean before RoPE leaves
            offset = constant.T.to(device, dtype).contiguous()
        term = frames.position_coefficients(layer, per_head)
        return LayerFrame(
            query.to(device, dtype).contiguous(),
            frames.output_from_frame(eye).to(device, dtype),
            offset,
            None if term is None else term[0].transpose(0, 1).to(device, dtype).contiguous(),
            None if term is None else term[1].to(device, torch.float32).contiguous(),
        )

    def queries(self, queries: Tensor) -> Tensor:
        """(n, n_q_heads, d) into the frame."""
        return torch.einsum("nhd,hde->nhe", queries, self.query.expand(queries.shape[1], -1, -1))

    def offsets(self, queries: Tensor) -> Tensor | None:
        """(n, n_q_heads) that every logit of a head gets."""
        return None if self.offset is None else (queries * self.offset).sum(-1)

    def term(self, queries: Tensor) -> PositionTerm | None:
        """What each logit gets by its token's position."""
        if self.position is None or self.frequencies is None:
            return None
        coefficients = torch.einsum("nhd,hdip->nhip", queries, self.position)
        return PositionTerm(coefficients.contiguous(), self.frequencies)

    def outputs(self, outputs: Tensor) -> Tensor:
        """(n, n_q_heads, d) out of the frame."""
        return outputs @ self.output

    @property
    def n_bytes(self) -> int:
        """Bytes of its tensors."""
        tensors = (self.query, self.output, self.offset, self.position, self.frequencies)
        return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)
