"""An allocation's policy as a coding of a prompt that it was not made for.

The prompt's context runs through the model once, dense; each layer's queries and keys score its
tokens (`ContextPolicy`), and the quotas make that a plan.  Source: ours.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sphkv_cli.evaluation.coding import DenseCoding
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.masked_attention import CodedRun, reading_coded
from sphkv_cli.evaluation.plan_coding import PlanCoding
from sphkv_cli.evaluation.protocol import RetentionProtocol
from sphkv_cli.generation.context_policy import ContextPolicy


@dataclass
class _ScoringRun:
    """Dense attention that places each layer's tokens as it goes; placed: per layer (n, heads)."""

    model: JudgedModel
    policy: ContextPolicy
    dense: CodedRun
    placed: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        layer = next(i for i, known in enumerate(self.model.modules) if known is module)
        n_context = key.shape[2]
        keys, values = (x[0].transpose(0, 1).float() for x in (key, value))
        asked = self.policy.asked_tokens(n_context).to(query.device)
        queries = query[0][:, asked].transpose(0, 1).float()
        positions = torch.arange(n_context, device=key.device)
        self.placed[layer], _ = self.policy.place(layer, queries, keys, values, positions)
        return self.dense.attend(module, query, key, value)


def policy_coding(
    model: JudgedModel, policy: ContextPolicy, context_ids: Tensor, label: str = "policy"
) -> PlanCoding:
    """The policy's plan for a context (n_context) int64.

    Raises:
        SphkvError: the budget of so short a context is below its metadata.
    """
    n_context = int(context_ids.numel())
    n_bytes = policy.laid_out_bytes(n_context)
    protocol = RetentionProtocol(n_context)
    dense = CodedRun(model.geometry, model.modules, DenseCoding(model.shape), protocol)
    run = _ScoringRun(model, policy, dense)
    with reading_coded(model.model, run):
        model.dense_hidden(context_ids.to(model.model.device))
    dense.check_complete()
    tier_of_token = np.stack([run.placed[i].numpy().T for i in range(model.geometry.n_layers)])
    return PlanCoding(
        label, policy.layout.tiers, policy.frames, model.shape, tier_of_token, n_bytes
    )
