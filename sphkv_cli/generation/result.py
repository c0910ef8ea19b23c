"""What `generate` found, as plain rows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Continuation:
    """One prompt continued greedily by the same model with two caches.

    first_difference: index of the first generated token that differs, None where none does;
    probability_dense, probability_coded: that the dense run gives its own token there and the one
    the coded run took (a near tie is no loss), None likewise.
    n_coded: tokens that lie in pages or were dropped at the end; where it is 0 both runs are dense.
    dense_bytes, coded_bytes: of the tensors that each cache holds at the end; coded_token_bytes:
    without the coded cache's frames; *_seconds: of all steps, prompt included.
    """

    name: str
    n_prompt: int
    n_generated: int
    n_coded: int
    dense_text: str
    coded_text: str
    first_difference: int | None
    probability_dense: float | None
    probability_coded: float | None
    dense_bytes: int
    coded_token_bytes: int
    coded_bytes: int
    dense_seconds: float
    coded_seconds: float


@dataclass(frozen=True)
class GenerationResult:
    """cache: what the coded runs used; backend: what read the codes; dtype: of the model.

    budget: as asked for, None without; frame_bytes: in every `coded_bytes`, fixed tensors of the
    model, the same at any length.
    """

    model: str
    cache: str
    backend: str
    dtype: str
    budget: str | None
    frame_bytes: int
    continuations: tuple[Continuation, ...]
