"""`SphericalCache`: a transformers Cache whose past is coded pages.

    cache = SphericalCache.from_policy("allocation.h5", model)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=100)

The prompt is attended to dense and coded once it has been read, layer by layer; what follows reads
the codes.  Keys and values are never held dense beside them, but in the tail.  Source: ours.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from sphkv_cli.errors import EnvironmentUnable, SphkvError, UsageError
from sphkv_cli.generation.attention import (
    HANDED,
    AttentionCall,
    Handed,
    attend_dense,
    register,
)
from sphkv_cli.generation.budget_seal import pages_due, sealed_within
from sphkv_cli.generation.coded_part import LayerReader
from sphkv_cli.generation.decode_steps import DecodeSteps
from sphkv_cli.generation.layer_frame import LayerFrame
from sphkv_cli.generation.layer_store import LayerStore
from sphkv_cli.generation.matching import policy_for, uniform_for
from sphkv_cli.generation.new_tokens import read_tokens
from sphkv_cli.generation.placement import PlacementRule, PolicyRule
from sphkv_cli.generation.store_state import NewTokens, StoreState
from sphkv_cli.generation.trial import try_pages
from sphkv_cli.models.geometry import ModelGeometry, inspect_model
from sphkv_kernels.block_words import decoded_layout_of

Backend = Literal["auto", "cuda", "reference"]
_TRIAL_TOKENS = 3


class SphericalCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """A cache of one batch, made by `from_policy` or `uniform`.

    Raises at construction what cannot work; later SphkvError: for more tokens than the model's
    context or memory that runs out while they are read, the cache unchanged; for vectors that no
    code can hold or memory that runs out while they are coded, the last token in it, dense.  After
    the latter a cache that keeps a budget wants a `reset`.
    """

    def __init__(self, model: Any, rule: PlacementRule, *, backend: Backend = "auto") -> None:
        """See `from_policy`; rule: which tokens are coded, when, and how.

        Raises:
            SphkvError: a model in training, or one whose attention does not follow its cache.
            EnvironmentUnable: backend "cuda" without a CUDA device under the model.
        """
        if model.training:
            raise SphkvError("the model is in training mode", "call model.eval()")
        self.geometry: ModelGeometry
        self.geometry, modules = inspect_model(model)
        self.rule = rule
        self._uses_kernel = _uses_kernel(backend, model)
        if self._uses_kernel:
            _require_native(rule)
        self.stores = [
            LayerStore(
                rule,
                index,
                layer.window,
                self.geometry.n_q_heads // self.geometry.n_kv_heads,
                self._uses_kernel,
                self.geometry.max_tokens,
            )
            for index, layer in enumerate(self.geometry.layers)
        ]
        self._frames = [self._frame(index, module) for index, module in enumerate(modules)]
        self._readers = [
            LayerReader(layer, frame, self._uses_kernel)
            for layer, frame in zip(self.geometry.layers, self._frames, strict=True)
        ]
        self._states: list[StoreState | None] = [None] * self.geometry.n_layers
        self._before: list[StoreState | None] = list(self._states)
        self._tokens: NewTokens | None = None
        self._may_step = self._steps_fit = (
            model.dtype == torch.bfloat16 and len(self._devices()) == 1
        )
        self._steps: DecodeSteps | None = None
        self._is_captured = False
        given = rule.keeper if isinstance(rule, PolicyRule) else None
        # What it knows of its pages is this cache's own; a rule may serve several.
        self._keeper = None if given is None else given.fresh()
        self.n_columns = 0
        super().__init__(layers=[SphericalLayer(self, i) for i in range(self.geometry.n_layers)])
        before = model.config._attn_implementation
        model.set_attn_implementation(register())
        try:
            self._try(model)
        except BaseException:
            model.set_attn_implementation(before)
            raise

    @staticmethod
    def from_policy(
        allocation: str | Path,
        model: Any,
        *,
        window: int | None = 32,
        budget: str | None = None,
        shrink: Sequence[tuple[int, float]] = (),
        backend: Backend = "auto",
    ) -> "SphericalCache":
        """A cache that keeps what an allocation's policy keeps.

        Args:
            allocation: allocation.h5, made for this model.
            model: a loaded transformers causal model; it attends through this module from now on.
            window: tokens after the prompt that stay dense at least; None: all of them.
            budget: of each sequence, kept while it grows by demoting sealed pages: "2b" or "0.1x"
                per token, "12MiB" in all.  While the tables take more than half of a budget per
                token nothing is sealed.  Without a budget the prompt gets the allocation's and
                later pages a tier of its bits per coordinate.
            shrink: (n_tokens, factor): once so many tokens are sealed, so much of the budget.
            backend: "cuda" reads the codes with the kernel, "reference" in float64; "auto" is
                "cuda" where the model lies on a CUDA device.

        Raises:
            ArtifactError: the file is damaged, or for another model, RoPE or other layers.
            UsageError: a budget that the tables take, or of an allocation that pins tokens.
            SphkvError: as the class says.
        """
        rule = policy_for(Path(allocation), model, window, budget, shrink)
        return SphericalCache(model, rule, backend=backend)

    @staticmethod
    def uniform(
        codebooks: str | Path,
        tier: str,
        model: Any,
        *,
        window: int = 32,
        first_tokens: int = 4,
        page_size: int = 32,
        backend: Backend = "auto",
    ) -> "SphericalCache":
        """A cache in one tier: by name one of codebooks.h5, or int8, or dense.

        Raises:
            ArtifactError, UsageError, SphkvError: as `from_policy`; an unknown tier.
        """
        rule = uniform_for(Path(codebooks), tier, model, page_size, window, first_tokens)
        return SphericalCache(model, rule, backend=backend)

    @property
    def n_sequences(self) -> int:
        """Sequences of the batch; 0 before a prompt."""
        held: StoreState | DecodeSteps | None = self._steps or self._states[0]
        return 0 if held is None else held.n_sequences

    def next_positions(self) -> Tensor:
        """(n_sequences) int64, on the CPU."""
        held: StoreState | DecodeSteps | None = self._steps or self._states[0]
        return torch.tensor([] if held is None else held.next_position, dtype=torch.int64)

    @property
    def takes_steps(self) -> bool:
        """Whether single tokens go the short way of `decode_steps.py`, once they can."""
        return self._steps_fit

    @property
    def backend(self) -> str:
        """What reads the codes: "cuda" or "reference"."""
        return "cuda" if self._uses_kernel else "reference"

    def memory_bytes(self) -> int:
        """Bytes of every tensor that the cache holds, its frames included."""
        states = sum(state.n_bytes for state in self._states if state is not None)
        if self._steps is not None:
            states = self._steps.n_bytes
        return states + self.frame_bytes

    @property
    def frame_bytes(self) -> int:
        """The part of `memory_bytes` that is fixed by the model: the same at any length and batch,
        and outside a budget, which counts the tables that an allocation lays out."""
        return sum(frame.n_bytes for frame in self._frames)

    @property
    def _held(self) -> StoreState | DecodeSteps | None:
        return self._steps or self._states[0]

    @property
    def n_coded_tokens(self) -> int:
        """Tokens of all sequences that lie in pages or were dropped; the others are dense."""
        held = self._held
        return 0 if held is None else sum(held.n_sealed)

    @property
    def first_budget_tokens(self) -> int:
        """The fewest tokens of which a budget lets some be coded: until it is twice the plan's
        tables everything stays dense. 0 without a budget, or with one in bytes."""
        return 0 if self._keeper is None else self._keeper.first_tokens

    def dense_bytes(self, bytes_per_number: int = 2) -> int:
        """What the same tokens take in a dense cache."""
        held = self._held
        n_tokens = 0 if held is None else sum(held.n_tail) + sum(held.n_sealed)
        shape = self.geometry
        return 2 * n_tokens * shape.n_layers * shape.n_kv_heads * shape.head_dim * bytes_per_number

    def device_of(self, layer: int) -> torch.device:
        """Where a layer's tokens lie."""
        return self._frames[layer].device

    def adopt(self, layer: int, state: StoreState) -> None:
        """Take over a layer's state as it is (synthetic.py)."""
        self.undo()
        self._leave_steps()
        self._states[layer] = self._before[layer] = state

    def states(self) -> tuple[StoreState | None, ...]:
        """What each layer keeps; for tests and reports."""
        return tuple(self._states if self._steps is None else self._steps.states())

    @property
    def is_croppable(self) -> bool:
        """Whether generation may take back any number of tokens; only `crop`'s last ones."""
        return False

    # What transformers asks of a cache.

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove tokens, which must lie in the tail.

        Raises:
            SphkvError: some of them are sealed in pages; nothing is changed.
        """
        if tokens_to_remove > 0:
            raise ValueError("crop takes 0 or minus the number of tokens to take back")
        self.undo()
        n_gone = -tokens_to_remove
        if not n_gone or not self.n_columns:
            return
        held = [self._steps] if self._steps is not None else self._states
        left = min(n for one in held if one is not None for n in one.n_tail)
        if n_gone > left:
            raise SphkvError(
                f"{n_gone} tokens were to be taken back, {left} are not sealed in pages yet",
                "take back fewer, or make the cache anew with a larger window",
            )
        if self._steps is not None:
            self._steps.crop(n_gone)
        else:
            self._states = [_without_last(one, n_gone) for one in self._states if one is not None]
        self.n_columns -= n_gone

    def reset(self) -> None:
        """Forget all tokens."""
        self._states = [None] * self.geometry.n_layers
        self._before = list(self._states)
        self._tokens = self._steps = None
        if self._keeper is not None:
            self._keeper.forget()
        self._may_step = self._steps_fit
        self.n_columns = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes sequence beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The same; indices (n) int64."""
        chosen = indices.tolist()
        self.undo()
        if self._keeper is not None:
            raise SphkvError(
                "a cache that keeps a budget knows its sequences by their places",
                "generate without beams, or leave the budget away",
            )
        self._leave_steps()
        # Beams are reordered at every token, and would enter and leave at every token.
        self._may_step = False
        self._states = [
            None if state is None else store.selected(state, chosen)
            for store, state in zip(self.stores, self._states, strict=True)
        ]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times."""
        if self.n_sequences:
            every = torch.arange(self.n_sequences).repeat_interleave(repeats)
            self.batch_select_indices(every)

    # What a forward pass does, layer by layer.

    def hand_over(self, layer: int, keys: Tensor) -> None:
        """Before a layer attends: check the step, and wait for its attention.

        Raises:
            SphkvError: the layer before did not attend to what it cached, or too many tokens.
        """
        waiting = HANDED.get()
        if layer == 0:
            # A forward pass that was interrupted has left the first layers a step ahead.
            self.undo()
        elif waiting is not None and waiting.cache is self:
            self.undo()
            raise SphkvError(
                f"layer {self.geometry.layers[waiting.layer].name} does not attend to the keys "
                "that it caches",
                "its architecture is not supported",
            )
        if layer == 0:
            self._before = list(self._states)
            self.require_room(keys.shape[2])
            if self.n_sequences not in (0, keys.shape[0]):
                raise SphkvError(
                    f"a batch of {keys.shape[0]}, the cache holds {self.n_sequences} sequences",
                    "make a new cache for a new batch",
                )
        HANDED.set(Handed(self, layer, keys))

    def require_room(self, n_new: int) -> None:
        """Refuse more tokens than the model's context, or any after a budget's seal failed.

        Raises:
            SphkvError: as said; nothing was stored.
        """
        if self._keeper is not None:
            self._keeper.require_known()
        n_after = self.n_columns + n_new
        if n_after > self.geometry.max_tokens:
            raise SphkvError(
                f"{n_after} tokens, the model's context is {self.geometry.max_tokens}",
                "give a shorter prompt, or generate fewer tokens",
            )

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall
    ) -> Tensor:
        """The layer's attention, after which its new tokens are stored."""
        try:
            return self._attend(layer, query, key, value, call)
        except torch.OutOfMemoryError as error:
            self.undo()
            raise SphkvError(
                f"the device ran out of memory in layer {layer} while coding or reading "
                f"{self.n_columns + key.shape[2]} tokens; the cache is as it was before",
                "give a shorter prompt or a smaller batch",
            ) from error
        except BaseException:
            self.undo()
            raise

    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall
    ) -> Tensor:
        if self._tokens is None:
            self._tokens = self._read_tokens(key, call)
            self._choose_way(self._tokens)
        if self._steps is not None:
            output = self._steps.attend(layer, query, key, value)
            if layer == self.geometry.n_layers - 1:
                self.end_step()
                self._tokens = None
            return output
        tokens, store, before = self._tokens, self.stores[layer], self._states[layer]
        state = store.appended(before, key, value, tokens)
        if before is None:
            output = attend_dense(query, key, value, call)
            asked = [
                q[:, torch.tensor(columns, dtype=torch.int64)[self.rule.asked_tokens(len(columns))]]
                for q, columns in zip(query, tokens.stored, strict=True)
            ]
            asked = [q.transpose(0, 1).float() for q in asked]
            state = store.prompt_placed(state, asked)
        else:
            output = self._readers[layer].attend(state, query, tokens).transpose(1, 2).contiguous()
            state = state if self._keeper is not None else store.later_placed(state)
        self._states[layer] = state
        if layer == self.geometry.n_layers - 1:
            self._keep_budget()
            self.n_columns += key.shape[2]
            self._before, self._tokens = list(self._states), None
        return output

    def _read_tokens(self, key: Tensor, call: AttentionCall) -> NewTokens:
        if self._is_captured:
            # Whatever asks the device cannot be captured; `DecodeGraph` knows its tokens.
            assert self._steps is not None
            every = ((0,),) * self.n_sequences
            return NewTokens(1, every, tuple(self._steps.next_position))
        held: StoreState | DecodeSteps | None = self._steps or self._states[0]
        known = None if held is None else tuple(held.next_position)
        positions = call.options.get("position_ids")
        return read_tokens(key.shape[0], key.shape[2], call.mask, positions, known)

    def _choose_way(self, tokens: NewTokens) -> None:
        """One token of every sequence goes the short way (`decode_steps.py`) where it is open."""
        if not tokens.is_one_each:
            self._leave_steps()
            self._before = list(self._states)
        elif self.enter_steps() is not None:
            assert self._steps is not None
            self._steps.begin()

    def enter_steps(self) -> DecodeSteps | None:
        """The cache ready for one token per sequence at a time, or None where that is not open:
        before a prompt, in a dtype other than bfloat16, over several devices, after beams were
        reordered, or while the first tokens still wait for a page of their own.
        """
        if self._steps is not None and self._steps.is_torn:
            self._leave_steps()
        states = [state for state in self._states if state is not None]
        is_open = self._steps is None and self._may_step and len(states) == len(self._states)
        if is_open and all(self.rule.is_steady(n) for n in states[0].n_sealed):
            nothing: list[StoreState | None] = [None] * len(states)
            self._states, self._before = nothing, list(nothing)
            try:
                self._steps = DecodeSteps(self.stores, self._readers, states)
            except BaseException:
                self._states, self._before = list(states), list(states)
                raise
        return self._steps

    def end_step(self) -> None:
        """All layers have the step's tokens: count them, and seal what is due."""
        if not self._is_captured:
            assert self._steps is not None
            self.n_columns += 1
            self._steps.finish()
            if isinstance(self.rule, PolicyRule) and self._keeper is not None:
                counts = self._steps.n_sealed, self._steps.n_tail
                if any(pages_due(self.rule, self._keeper, *counts)):
                    self._leave_steps()
                    # `_before` holds the step's token: what a seal that fails goes back to.
                    self._keep_budget()
                    self._before = list(self._states)

    def _keep_budget(self) -> None:
        """Where a budget is kept: seal what is due in all layers, within it."""
        if isinstance(self.rule, PolicyRule) and self._keeper is not None:
            try:
                sealed_within(self.rule, self._keeper, self.stores, self._states)
            except BaseException:
                # Some layers are sealed and others not: as before the seal, all of them.
                self._states = list(self._before)
                raise

    @contextmanager
    def captured(self) -> Iterator[None]:
        """A forward pass inside is recorded by a CUDA graph, not made."""
        self._is_captured = True
        try:
            yield
        finally:
            self._is_captured, self._tokens = False, None
            HANDED.set(None)

    def _leave_steps(self) -> None:
        if self._steps is not None:
            self._states = list(self._steps.states())
            self._before, self._steps = list(self._states), None

    def undo(self) -> None:
        """Forget the step that is under way, if one is: a forward pass that was interrupted."""
        HANDED.set(None)
        if self._tokens is not None:
            self._tokens = None
            if self._steps is not None:
                self._steps.undo()
            else:
                self._states = list(self._before)

    def _devices(self) -> set[torch.device]:
        return {frame.device for frame in self._frames}

    def _frame(self, layer: int, module: Any) -> LayerFrame:
        device = next(module.parameters()).device
        return LayerFrame.of(
            self.rule.frames,
            layer,
            self.geometry.n_q_heads,
            self.geometry.n_kv_heads,
            device,
            uses_kernel=self._uses_kernel,
        )

    def _try(self, model: Any) -> None:
        """Try the pages of every kind of layer, then a few tokens through the model and this cache,
        so that nothing fails later."""
        tried = set()
        for layer, described in enumerate(self.geometry.layers):
            kind = (
                described.window > 0,
                described.logit_softcap > 0,
                self.rule.frames.needs_positions(layer),
                self.device_of(layer),
            )
            if kind not in tried:
                tried.add(kind)
                try_pages(self.stores[layer], self._readers[layer], self.geometry, model)
        ids = torch.arange(_TRIAL_TOKENS, device=model.device)[None]
        with torch.inference_mode():
            for part in (ids[:, :-1], ids[:, -1:]):
                model(input_ids=part, past_key_values=self)
        if self.n_columns != _TRIAL_TOKENS or any(state is None for state in self.states()):
            raise SphkvError(
                f"{type(model).__name__} has a layer that does not attend through its cache",
                "its architecture is not supported",
            )
        self.reset()


class SphericalLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """What transformers sees of one layer: it stores nothing itself."""

    def __init__(self, cache: SphericalCache, layer: int) -> None:
        super().__init__()
        self._cache = cache
        self._layer = layer

    supports_early_init = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are; they are stored when the layer has attended."""
        self._cache.hand_over(self._layer, key_states)
        self.is_initialized = True
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """A mask over every column that ever came."""
        return self._cache.n_columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns that came, padding included."""
        return self._cache.n_columns

    def get_max_length(self) -> int:
        """The model's context."""
        return self._cache.geometry.max_tokens


def _require_native(rule: PlacementRule) -> None:
    """Refuse codes that the kernel has no decoder for."""
    for tier in rule.tiers:
        for code in (tier.key_code, tier.value_code):
            if code is not None and decoded_layout_of(code) is None:
                raise UsageError(
                    f"the CUDA kernel does not read the code {code.name}",
                    "choose another tier, or the reference backend",
                )


def _without_last(state: StoreState, n_gone: int) -> StoreState:
    return replace(
        state,
        n_tail=tuple(n - n_gone for n in state.n_tail),
        next_position=tuple(p - n_gone for p in state.next_position),
    )


def _uses_kernel(backend: Backend, model: Any) -> bool:
    devices = {parameter.device.type for parameter in model.parameters()}
    if backend == "auto":
        return devices == {"cuda"}
    if backend not in ("cuda", "reference"):
        raise UsageError(f"backend {backend!r} is unknown", "choose auto, cuda or reference")
    if backend == "cuda" and devices != {"cuda"}:
        raise EnvironmentUnable(
            f"the CUDA backend needs the model on a GPU, it lies on {', '.join(sorted(devices))}",
            "load it there (device cuda), or choose the reference backend",
        )
    return backend == "cuda"
