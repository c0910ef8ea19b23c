"""A prompt is coded when all of it is there, but for its first tokens; what follows reads it.

    query i reads token j coded  iff  first_tokens <= j < n_context <= i

Between `RetentionProtocol`, whose coded first token alone is most of the damage of a coarse code,
and `UniformProtocol`, in which queries would read books fitted to tokens that come after them.
Source: ours.
"""

from dataclasses import dataclass

from torch import Tensor

from sphkv_cli.errors import UsageError
from sphkv_cli.evaluation.protocol import ReadProtocol


@dataclass(frozen=True)
class PromptProtocol(ReadProtocol):
    """n_context: tokens of the prompt; first_tokens: at its start, dense for good."""

    n_context: int
    first_tokens: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.first_tokens < self.n_context:
            raise UsageError(
                f"a prompt of {self.n_context} tokens keeps its first {self.first_tokens} dense",
                "give it more tokens than that",
            )

    def reads_coded(self, queries: Tensor, tokens: Tensor) -> Tensor:
        inside = (tokens >= self.first_tokens) & (tokens < self.n_context)
        return (queries >= self.n_context)[:, None] & inside[None, :]

    def coded_positions(self, n_tokens: int) -> range:
        return range(self.first_tokens, max(min(n_tokens, self.n_context), self.first_tokens))

    def coded_span(self, n_tokens: int, token_group: int) -> int:
        return min(n_tokens, self.n_context)

    def scored(self, n_tokens: int) -> range:
        return range(self.n_context, n_tokens - 1)

    def check_group(self, name: str, token_group: int) -> None:
        # The prompt is there as a whole before any of it is coded.
        return

    @property
    def description(self) -> str:
        return (
            f"a prompt of {self.n_context} tokens is prefilled dense and coded once, its first "
            f"{self.first_tokens} tokens apart; the tokens after it stay dense and read it"
        )
