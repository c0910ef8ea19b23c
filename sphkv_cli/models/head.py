"""The language-model head: final hidden states to logits, soft cap included."""

from collections.abc import Callable
from typing import Any

import torch

from sphkv_cli.errors import SphkvError


def language_head(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of hidden states (n, hidden_dim) that returns logits (n, vocabulary).

    Raises:
        SphkvError: the model has no such head.
    """
    softcap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    linear = model.get_output_embeddings()
    if linear is None:
        raise SphkvError(
            f"{type(model).__name__} has no language-model head", "name a causal language model"
        )

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = linear(hidden)
        return softcap * torch.tanh(logits / softcap) if softcap else logits

    return head
