"""A decode step of the whole model as one CUDA graph: what the host does once, not per token.

    step = DecodeGraph(model, cache)                   logits = step(token)
    with DecodeGraph(model, cache): model.generate(..., past_key_values=cache)

A step of a few milliseconds is some thousand launches, which a host needs longer to ask for than
the GPU to do.  The first step is made as usual, the second is captured, all that follow replay it.
Pages are sealed between replays into slots that the captured step reads already; only when the
slots are used up, or tokens came another way, is it captured anew.  Source: ours.
"""

import functools
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sphkv_cli.errors import SphkvError
from sphkv_cli.generation.decode_steps import DecodeSteps
from sphkv_cli.generation.spherical_cache import SphericalCache


class DecodeGraph:
    """One token of every sequence in, logits out.

    Raises at construction where steps of this cache cannot be captured; SphkvError at the second
    step if the model's own forward pass asks the device for numbers, which no graph can.
    """

    def __init__(self, model: Any, cache: SphericalCache) -> None:
        if cache.backend != "cuda" or not cache.takes_steps:
            raise SphkvError(
                f"a cache on {cache.device_of(0)} for a model in {model.dtype} has no steps that a "
                "CUDA graph can hold",
                "load the model in bfloat16 on one GPU, or generate without the graph",
            )
        self._model, self._cache = model, cache
        self._forward = model.forward
        self._own_forward: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._epoch = -1
        self._is_warm = False
        self._ids = self._logits = torch.empty(0)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """The next step: logits (n_sequences, 1, n_vocabulary), overwritten by the one after it.

        token_ids: (n_sequences, 1) int64 on the model's device; every sequence goes on at its own
        next position.

        Raises:
            SphkvError: as the cache's own steps, or the step cannot be captured.
        """
        cache = self._cache
        # A step that was interrupted, on the device or between layers, has not been.
        cache.undo()
        if token_ids.shape != (cache.n_sequences, 1):
            raise SphkvError(
                f"token_ids {tuple(token_ids.shape)} for {cache.n_sequences} cached sequences",
                "read a prompt first, then give one token of each sequence",
            )
        with torch.no_grad():
            steps = cache.enter_steps()
            if steps is None or not self._is_warm:
                self._is_warm = steps is not None
                return self._plain(token_ids)
            cache.require_room(1)
            steps.require_row()
            if self._graph is None or self._epoch != steps.epoch:
                self._capture(steps, token_ids)
            assert self._graph is not None
            self._ids.copy_(token_ids)
            try:
                self._graph.replay()
                cache.end_step()
            except BaseException:
                # The device's clock is ahead of what was counted.
                steps.undo()
                raise
        return self._logits

    def __enter__(self) -> "DecodeGraph":
        """Single tokens through the model and this cache go through the graph until the exit."""

        @functools.wraps(self._forward)
        def forward(*args: Any, **options: Any) -> Any:
            ids, cache = options.get("input_ids"), options.get("past_key_values")
            asks_more = options.get("output_attentions") or options.get("output_hidden_states")
            is_usual = args or asks_more or cache is not self._cache or not self._cache.n_columns
            if is_usual or not isinstance(ids, Tensor) or ids.shape[1] != 1:
                return self._forward(*args, **options)
            from transformers.modeling_outputs import CausalLMOutputWithPast

            return CausalLMOutputWithPast(logits=self(ids), past_key_values=cache)

        self._own_forward = self._model.__dict__.get("forward")
        self._model.forward = forward
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._own_forward is None:
            del self._model.forward
        else:
            self._model.forward = self._own_forward

    def _plain(self, token_ids: Tensor) -> Tensor:
        """A step as the model makes it; positions as the cache counts them."""
        positions = self._cache.next_positions().to(token_ids.device)[:, None]
        found: Tensor = self._forward(
            input_ids=token_ids, position_ids=positions, past_key_values=self._cache
        ).logits
        return found

    def _capture(self, steps: DecodeSteps, token_ids: Tensor) -> None:
        # What the old graph held is free before the new one is made.
        self._graph, self._logits = None, torch.empty(0)
        self._ids = token_ids.clone()
        # A mask that is there already, which no one reads: making one asks the device.
        mask = torch.ones((*token_ids.shape, 1, 1), dtype=torch.bool, device=token_ids.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                self._cache.captured(),
                torch.cuda.graph(graph, capture_error_mode="thread_local"),
            ):
                self._logits = self._forward(
                    input_ids=self._ids,
                    attention_mask=mask,
                    position_ids=steps.clock.position_ids,
                    past_key_values=self._cache,
                ).logits
        except RuntimeError as error:
            steps.undo()
            raise SphkvError(
                f"a step of {type(self._model).__name__} cannot be captured ({error})",
                "generate without the graph",
            ) from error
        finally:
            steps.clock.forget_turns()
        self._graph, self._epoch = graph, steps.epoch
