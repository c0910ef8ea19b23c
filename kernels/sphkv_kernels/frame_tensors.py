"""One layer's frame as matrices, and what a decode step's queries become in it.

    q' = q M_h   offset = q . c_h   (a, b) = q W_h   v' = v S   o = o' S^T
    k' = (k - c_h - R_t mu_h) K_h,   R_t mu_h = cos(w t) mu_h + sin(w t) nu_h

c_h: the mean after RoPE, or what a truncated one before RoPE leaves; mu_h: the mean before RoPE.
`framing` multiplies on a GPU, `framing_reference` anywhere.  Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_kernels.launch_arguments import require
from sphkv_kernels.position_term import PositionTerm
from sphkv_kernels.tier import PageError


@dataclass(frozen=True, eq=False)
class FrameTensors:
    """Contiguous, on one device, in one dtype: float32 for the kernel, float64 for the reference.

    query (n_q_heads or 1, d, d), key (n_kv_heads or 1, d, d), value and output (d, d): what rows
    are multiplied with.  centre (n_kv_heads, d): c, or None; mean and turned (n_kv_heads, d): mu
    and nu, or None.  position
    (n_q_heads, d, 2, n_pairs): from a query to the coefficients of its position term, and
    frequencies (n_kv_heads, n_pairs) float32, that term's, or both None.  offset (n_q_heads, d):
    from a query to what all its logits get, or None.

    Raises PageError at construction: shapes, dtypes or devices that do not fit.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    n_q_heads: int
    n_kv_heads: int
    centre: Tensor | None = None
    mean: Tensor | None = None
    turned: Tensor | None = None
    position: Tensor | None = None
    frequencies: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        d = self.head_dim
        of_keys, of_queries = (self.n_kv_heads, d), (self.n_q_heads, d)
        shapes = {
            "query": (self.query.shape[0] if self.query.shape[0] == 1 else self.n_q_heads, d, d),
            "key": (self.key.shape[0] if self.key.shape[0] == 1 else self.n_kv_heads, d, d),
            "value": (d, d),
            "output": (d, d),
            "centre": of_keys,
            "mean": of_keys,
            "turned": of_keys,
            "position": (*of_queries, 2, self.n_pairs),
            "offset": of_queries,
        }
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None:
                require(f"frame.{name}", tensor, shape, self.dtype, self.device)
        if self.frequencies is not None:
            of_term = (self.n_kv_heads, self.n_pairs)
            require("frame.frequencies", self.frequencies, of_term, torch.float32, self.device)
        if (self.mean is None) != (self.turned is None):
            raise PageError("a mean that turns needs both of its parts")
        if (self.position is None) != (self.frequencies is None):
            raise PageError("a position term needs its matrix and its frequencies")

    @property
    def head_dim(self) -> int:
        """d."""
        return self.value.shape[-1]

    @property
    def n_pairs(self) -> int:
        """RoPE pairs of the position term, 0 without one."""
        return 0 if self.position is None else self.position.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Of every tensor but the frequencies."""
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.value.device

    @property
    def n_bytes(self) -> int:
        """Bytes of every tensor."""
        given = (self.query, self.key, self.value, self.output, self.centre, self.mean)
        tensors = (*given, self.turned, self.position, self.frequencies, self.offset)
        return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


@dataclass(frozen=True, eq=False)
class FramedQueries:
    """What queries ask pages and tail, in the frame's dtype: query (n, n_q_heads, d), the position
    term or None, offset (n, n_q_heads) or None."""

    query: Tensor
    term: PositionTerm | None
    offset: Tensor | None


def check_tokens(
    frame: FrameTensors,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tail: Tensor,
    rows: Tensor,
    turns: tuple[Tensor, Tensor] | None,
) -> None:
    """Refuse what does not fit `frame_tokens`: PageError."""
    n, d, device = query.shape[0], frame.head_dim, frame.device
    vectors = {"query": (query, frame.n_q_heads)}
    vectors |= {"key": (key, frame.n_kv_heads), "value": (value, frame.n_kv_heads)}
    for name, (tensor, n_heads) in vectors.items():
        require(name, tensor, (n, n_heads, d), query.dtype, device, whole=False)
    require("rows", rows, (2 * n * frame.n_kv_heads,), torch.int64, device)
    require("tail", tail, (*tail.shape[:-1], d), torch.bfloat16, device)
    if (turns is None) != (frame.mean is None):
        raise PageError("turns are for frames whose mean turns, and for them alone")
    for name, turn in zip(("cosine", "sine"), turns or (), strict=False):
        require(name, turn, (n, 1, d), frame.dtype, device)
