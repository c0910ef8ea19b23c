"""A decoder against the float64 decode of the same codes.

logit     max |softmax_scale (z_decoder - z_codes)|
output    sqrt(sum ||o_decoder - o_codes||^2 / sum ||o_codes||^2), over the coded context alone
lse       max |lse_decoder - lse_codes|
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sphkv_cli.profile.candidate_errors import CodedAttention
from sphkv_cli.profile.decoders import Decoded
from sphkv_cli.profile.layer_inputs import LayerInputs


@dataclass
class ComputationSums:
    """Accumulates over documents; per query head of one layer."""

    n_q_heads: int
    logit_max: Tensor = field(init=False)
    lse_max: Tensor = field(init=False)
    error_sq: Tensor = field(init=False)
    output_sq: Tensor = field(init=False)

    def __post_init__(self) -> None:
        for name in ("logit_max", "lse_max", "error_sq", "output_sq"):
            setattr(self, name, torch.zeros(self.n_q_heads, dtype=torch.float64))

    def add(
        self,
        inputs: LayerInputs,
        kv_head: int,
        decoded: Decoded,
        codes: CodedAttention,
    ) -> None:
        """Take in one document and KV head; `codes`: the same codes in float64."""
        rows = decoded.rows
        for member in range(inputs.group_size):
            head = kv_head * inputs.group_size + member
            theirs = decoded.logits[:, kv_head, member, codes.tokens] * inputs.softmax_scale
            apart = (theirs - codes.logits[member, rows])[codes.seen[rows]].abs()
            if apart.numel():
                # A decoder that returns NaN must show: max() keeps it, fmax would not.
                self.logit_max[head] = torch.maximum(self.logit_max[head], apart.max())
            ours_lse, their_lse = codes.log_sum_exp[member, rows], decoded.log_sum_exp[:, head]
            both_empty = torch.isneginf(ours_lse) & torch.isneginf(their_lse)
            lse = torch.where(both_empty, 0.0, (ours_lse - their_lse).abs())
            self.lse_max[head] = torch.maximum(self.lse_max[head], lse.max())
            ours = codes.output[member, rows]
            self.error_sq[head] += (decoded.output[:, head] - ours).square().sum()
            self.output_sq[head] += ours.square().sum()

    def output_error(self) -> Tensor:
        """Relative, ``(n_q_heads)``; 0 where nothing was kept."""
        tiny = torch.finfo(torch.float64).tiny
        return (self.error_sq / self.output_sq.clamp(min=tiny)).sqrt()
