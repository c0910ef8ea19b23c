"""Which tokens a query reads from the coded cache, and which dense: the two protocols.

    uniform    query i reads token j coded  iff  i - j > window  and  j >= first_tokens
    retention  query i reads token j coded  iff  j < n_context <= i

uniform: the dense window moves with the query; every position of the document reads a coded past.
retention: a context is prefilled dense, coded once, and later tokens, dense, read it.
A query's own token is never coded.  Source: ours.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from sphkv_cli.errors import SphkvError, UsageError


class ReadProtocol(ABC):
    """Decides token by token what is read coded."""

    @abstractmethod
    def reads_coded(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """(n_queries, n_tokens) bool for positions (n_queries), (n_tokens); causality aside."""

    @abstractmethod
    def coded_positions(self, n_tokens: int) -> range:
        """Tokens that are stored coded once n_tokens are in the cache; the others lie dense."""

    @abstractmethod
    def coded_span(self, n_tokens: int, token_group: int) -> int:
        """So many first tokens are handed to the coding: all stored coded, in whole groups."""

    @abstractmethod
    def scored(self, n_tokens: int) -> range:
        """Positions whose next-token distribution is compared."""

    def require_coded(self, document: str, n_tokens: int) -> None:
        """Raise SphkvError for a document none of whose tokens is ever read coded."""
        return  # A protocol without a window codes some of every document.

    @abstractmethod
    def check_group(self, name: str, token_group: int) -> None:
        """Raise UsageError where a group of tokens would be read coded before it is full."""

    @property
    @abstractmethod
    def description(self) -> str:
        """One sentence for reports."""


@dataclass(frozen=True)
class UniformProtocol(ReadProtocol):
    """window: tokens before the query that stay dense; first_tokens: at the start, dense for good.

    first_scored: the first position that is compared.
    """

    window: int = 32
    first_tokens: int = 4
    first_scored: int = 64

    def __post_init__(self) -> None:
        for name in ("window", "first_tokens", "first_scored"):
            if getattr(self, name) < 0:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} is {getattr(self, name)}", "give 0 or more")

    def reads_coded(self, queries: Tensor, tokens: Tensor) -> Tensor:
        far = queries[:, None] - tokens[None, :] > self.window
        return far & (tokens >= self.first_tokens)[None, :]

    def coded_positions(self, n_tokens: int) -> range:
        return range(self.first_tokens, max(n_tokens - self.window, self.first_tokens))

    def coded_span(self, n_tokens: int, token_group: int) -> int:
        n_stored = max(n_tokens - self.window, 0)
        return min(-(-n_stored // token_group) * token_group, n_tokens)

    def scored(self, n_tokens: int) -> range:
        return range(self.first_scored, n_tokens - 1)

    def require_coded(self, document: str, n_tokens: int) -> None:
        if n_tokens - 1 - self.window <= self.first_tokens:
            raise SphkvError(
                f"document {document} has {n_tokens} tokens, none of which is read coded: the last "
                f"{self.window} before a query and the first {self.first_tokens} stay dense",
                "lower --window or --first-tokens, or capture longer documents",
            )

    def check_group(self, name: str, token_group: int) -> None:
        if self.window < token_group - 1:
            raise UsageError(
                f"{name} codes {token_group} tokens together, a window of {self.window} would "
                "code them before the last has come",
                f"give --window {token_group - 1} or more",
            )

    @property
    def description(self) -> str:
        return (
            f"uniform: every query reads the coded past; the last {self.window} tokens before it "
            f"and the first {self.first_tokens} stay dense"
        )


@dataclass(frozen=True)
class RetentionProtocol(ReadProtocol):
    """n_context: tokens of the context, coded once; everything after them stays dense."""

    n_context: int

    def __post_init__(self) -> None:
        if self.n_context < 1:
            raise UsageError(f"the context has {self.n_context} tokens", "give it 1 or more")

    def reads_coded(self, queries: Tensor, tokens: Tensor) -> Tensor:
        return (queries >= self.n_context)[:, None] & (tokens < self.n_context)[None, :]

    def coded_positions(self, n_tokens: int) -> range:
        return range(min(n_tokens, self.n_context))

    def coded_span(self, n_tokens: int, token_group: int) -> int:
        # A group that the context leaves unfinished waits; what comes after is never coded.
        return min(n_tokens, self.n_context)

    def scored(self, n_tokens: int) -> range:
        return range(self.n_context, n_tokens - 1)

    def check_group(self, name: str, token_group: int) -> None:
        # The context is there as a whole before any of it is coded.
        return

    @property
    def description(self) -> str:
        return (
            f"retention: a context of {self.n_context} tokens is prefilled dense and coded once, "
            "the tokens after it stay dense and read it"
        )
