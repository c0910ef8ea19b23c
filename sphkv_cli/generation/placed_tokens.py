"""Where the tokens of a tail go: tier and page of each, by KV head."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """The first tokens of a tail, placed: (n_placed, n_kv_heads) integer each, on the CPU.

    tier_of_token: -1 drops; page_of_token: numbers inside the KV head, from 0.
    """

    tier_of_token: Tensor
    page_of_token: Tensor

    @property
    def n_placed(self) -> int:
        """Tokens that leave the tail."""
        return int(self.tier_of_token.shape[0])
