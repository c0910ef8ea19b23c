"""A loaded model under evaluation: its final hidden states, dense or through a coded cache.

The body runs once per document and coding; logits are made afterwards, chunk by chunk
(`token_scores.py`), by the model's own head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphkv_cli.artifacts.capture_info import CaptureInfo
from sphkv_cli.errors import ArtifactError, SphkvError
from sphkv_cli.evaluation.coding import KeyValueCoding, ModelCacheShape
from sphkv_cli.evaluation.masked_attention import CodedRun, reading_coded
from sphkv_cli.evaluation.protocol import ReadProtocol
from sphkv_cli.models.digest import model_digest
from sphkv_cli.models.geometry import ModelGeometry, inspect_model
from sphkv_cli.models.head import language_head
from sphkv_cli.models.memory import is_out_of_memory

_CHECKED_TOKENS = 8


@dataclass(frozen=True)
class JudgedModel:
    """A transformers model with what evaluation needs to know of it."""

    model: Any
    geometry: ModelGeometry
    modules: Sequence[Any]
    head: Callable[[Tensor], Tensor]

    @staticmethod
    def of(model: Any) -> "JudgedModel":
        """Inspect a loaded model.

        Raises:
            SphkvError: its attention cannot be listened to, or its logits are not a linear head of
                its final hidden states (with an optional soft cap).
        """
        geometry, modules = inspect_model(model)
        judged = JudgedModel(model, geometry, modules, _head_of(model))
        judged._check_head()
        return judged

    @property
    def shape(self) -> ModelCacheShape:
        """What turns rates into bytes."""
        return ModelCacheShape(
            self.geometry.n_layers, self.geometry.n_kv_heads, self.geometry.head_dim
        )

    def require_captured(self, info: CaptureInfo, path: str) -> None:
        """Refuse a model that is not the captured one; raises ArtifactError."""
        found = model_digest(self.model)
        if found != info.model_digest:
            raise ArtifactError(
                f"{path} captures {info.model} (digest {info.model_digest[:12]}), the loaded model "
                f"has digest {found[:12]}",
                "name the captured model with --model, or capture this one",
            )

    def require_length(
        self, name: str, n_tokens: int, hint: str = "capture shorter documents"
    ) -> None:
        """Refuse a text longer than the model's context; raises SphkvError with `hint`."""
        if n_tokens > self.geometry.max_tokens:
            raise SphkvError(
                f"{name} has {n_tokens} tokens, the model's context is {self.geometry.max_tokens}",
                hint,
            )

    def dense_hidden(self, token_ids: Tensor) -> Tensor:
        """Final hidden states (n_tokens, hidden_dim), attention as the model was loaded with."""
        return self._hidden(token_ids)

    def coded_hidden(
        self, token_ids: Tensor, coding: KeyValueCoding, protocol: ReadProtocol
    ) -> tuple[Tensor, CodedRun]:
        """The same with every layer reading through `coding`; and the run, for its counts."""
        run = CodedRun(self.geometry, self.modules, coding, protocol)
        with reading_coded(self.model, run):
            hidden = self._hidden(token_ids)
        run.check_complete()
        return hidden, run

    def continued_hidden(self, token_ids: Tensor, first_position: int) -> Tensor:
        """Final hidden states of tokens from a later position on; only inside `reading_coded`,
        whose run knows what came before them."""
        steps = torch.arange(token_ids.numel(), device=self.model.device)
        return self._hidden(token_ids, position_ids=(first_position + steps)[None])

    def _hidden(self, token_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        body = self.model.get_decoder()
        ids = token_ids[None].to(self.model.device)
        try:
            with torch.inference_mode():
                output = body(input_ids=ids, position_ids=position_ids, use_cache=False)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise SphkvError(
                f"{self.model.device} ran out of memory on {token_ids.numel()} tokens",
                "capture shorter documents, or give a smaller --context",
            ) from error
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _check_head(self) -> None:
        vocabulary = int(self.model.get_input_embeddings().weight.shape[0])
        ids = torch.arange(_CHECKED_TOKENS, device=self.model.device) % vocabulary
        with torch.inference_mode():
            expected = self.model(input_ids=ids[None], use_cache=False).logits[0]
            found = self.head(self._hidden(ids))
        # The same arithmetic in another order at most.
        tolerance = 1e-3 if expected.dtype == torch.float32 else 5e-2
        scale = float(expected.abs().max()) or 1.0
        if float((found - expected).abs().max()) > tolerance * scale:
            raise SphkvError(
                f"the logits of {type(self.model).__name__} are not a linear head of its final "
                "hidden states",
                "its architecture is not supported",
            )


def _head_of(model: Any) -> Callable[[Tensor], Tensor]:
    return torch.inference_mode()(language_head(model))
