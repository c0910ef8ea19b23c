"""What is taken from a key before it is coded, where it depends on the position.

    none on top of the frame:  0
    before RoPE:               c_t = R_t mu,   mu = E[R_t^-1 k_t] over calibration keys

R_t is the model's rotary rotation: pairs (j, j + d/2) turned by t inv_freq_j (rotate-half, as
llama, qwen, mistral and gemma have it).  The term q . c_t is added to the logit exactly; it needs
the position of each token.  Source: ours.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


class KeyCentring(ABC):
    """A vector per (layer, KV head, position) that keys are coded relative to."""

    @abstractmethod
    def offset(self, layer: int, positions: Tensor, like: Tensor) -> Tensor | None:
        """c_t (n_tokens, n_kv_heads, head_dim) in the dtype and on the device of `like`."""

    @property
    @abstractmethod
    def table_bytes(self) -> int:
        """Bytes of its tables."""


@dataclass(frozen=True)
class FrameCentring(KeyCentring):
    """Nothing beyond what the frame itself subtracts."""

    def offset(self, layer: int, positions: Tensor, like: Tensor) -> Tensor | None:
        return None

    @property
    def table_bytes(self) -> int:
        return 0


@dataclass(frozen=True, eq=False)
class PreRopeCentring(KeyCentring):
    """mean: (n_layers, n_kv_heads, head_dim); inv_freq: (n_layers, head_dim / 2) radians per token.

    The whole head must be rotated (no partial rotary factor).
    """

    mean: Tensor
    inv_freq: Tensor

    def __post_init__(self) -> None:
        n_layers, _, head_dim = self.mean.shape
        if self.inv_freq.shape != (n_layers, head_dim // 2):
            raise ValueError(
                f"inv_freq {tuple(self.inv_freq.shape)} does not fit means "
                f"{tuple(self.mean.shape)}: every pair of every layer needs its frequency"
            )

    def offset(self, layer: int, positions: Tensor, like: Tensor) -> Tensor | None:
        turned = rotate(self.mean[layer][None], positions, self.inv_freq[layer])
        return turned.to(like)

    def truncated(self, n_pairs: int) -> "PreRopeCentring":
        """Only the n_pairs strongest RoPE pairs of each mean; the others become 0."""
        first, second = self.mean.chunk(2, dim=-1)
        strength = first.square() + second.square()
        rank = strength.argsort(dim=-1, descending=True).argsort(dim=-1)
        kept = torch.cat([rank < n_pairs] * 2, dim=-1)
        return PreRopeCentring(self.mean * kept, self.inv_freq)

    @property
    def table_bytes(self) -> int:
        return 4 * self.mean.numel()


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """R_t x for x (n_tokens or 1, n_heads, head_dim), positions (n_tokens)."""
    angles = positions.double()[:, None].cpu() * inv_freq.double()[None, :]
    cos = angles.cos().to(x.dtype).to(x.device)[:, None]
    sin = angles.sin().to(x.dtype).to(x.device)[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def pre_rope_mean(keys_of_documents: Iterable[Tensor], inv_freq: Tensor) -> Tensor:
    """E[R_t^-1 k_t] (n_kv_heads, head_dim) over keys (n_tokens, n_kv_heads, head_dim) from 0 on."""
    total: Tensor | None = None
    n_tokens = 0
    for keys in keys_of_documents:
        positions = torch.arange(keys.shape[0])
        before = rotate(keys.double(), -positions, inv_freq).sum(dim=0)
        total = before if total is None else total + before
        n_tokens += keys.shape[0]
    if total is None:
        raise ValueError("a mean needs at least one document")
    return total / n_tokens
