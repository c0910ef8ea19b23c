"""The budget of a cache as it grows: so much per token, at most so much, less from some point on.

    budget(n) = min(per_token n, at_most) * product of the factors whose first token has come

Source: ours.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class BudgetSchedule:
    """Bytes as a function of the tokens that are cached.

    per_token_bytes: for all layers and heads together; at_most_bytes: None for no limit; factors:
    (n_tokens, factor): from so many tokens on the budget is multiplied by so much.
    """

    per_token_bytes: float
    at_most_bytes: int | None = None
    factors: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not self.per_token_bytes > 0:
            raise ValueError(f"{self.per_token_bytes} bytes per token, must be above 0")
        if self.at_most_bytes is not None and self.at_most_bytes < 1:
            raise ValueError(f"at most {self.at_most_bytes} bytes, must be 1 or more")
        if any(not 0 < factor <= 1 for _, factor in self.factors):
            raise ValueError("factors must lie in (0, 1]: precision that is gone does not return")

    def budget_bytes(self, n_tokens: int) -> int:
        """The budget once n_tokens are cached."""
        budget = self.per_token_bytes * n_tokens
        if self.at_most_bytes is not None:
            budget = min(budget, float(self.at_most_bytes))
        for first, factor in self.factors:
            if n_tokens >= first:
                budget *= factor
        return int(budget)
