"""A decode step's vectors into the frame and its outputs out of it, one launch each.

    q' = q M_h   k' = (k - c_h - R_t mu_h) K_h   v' = v S   o = o' S

with the coefficients of a position term and the offset of a soft-capped logit where a frame has
them; new keys and values go straight to their rows of a dense tail.  Torch operations take eight
launches for it, most of a small step's time.  Sums are float32.  `cuda/frame.cu`; source: ours.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphkv_kernels.launch import capability_of, launch_function, load_function
from sphkv_kernels.tier import PageError
from sphkv_kernels.variant import SUPPORTED_HEAD_DIMS

_SOURCES = ("intrinsics.cuh", "frame.cu")
_FOLDER = Path(__file__).parent / "cuda"
_N_THREADS, _N_COLUMNS, _MOST_ROWS = 256, 64, 8
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True, eq=False)
class FrameTensors:
    """One layer's frame on a GPU: float32, contiguous.

    query (n_q_heads or 1, d, d), key (n_kv_heads or 1, d, d), value and output (d, d): matrices
    that rows are multiplied with.  centre (n_kv_heads, d): what every key loses, or None; mean and
    turned (n_kv_heads, d): what it loses times the cosine and the sine of its turn, or None.
    position (n_q_heads, d, 2, n_pairs): from a query to its coefficients, or None.  offset
    (n_q_heads, d): from a query to what all its logits get, or None.

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
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        d, device = self.head_dim, self.value.device
        if d not in SUPPORTED_HEAD_DIMS or device.type != "cuda":
            raise PageError(
                f"a frame of head_dim {d} on {device}: the CUDA kernel has {SUPPORTED_HEAD_DIMS}"
            )
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
                _require(f"frame.{name}", tensor, shape, torch.float32, device)
        if (self.mean is None) != (self.turned is None):
            raise PageError("a mean that turns needs both of its parts")

    @property
    def head_dim(self) -> int:
        """d."""
        return self.value.shape[-1]

    @property
    def n_pairs(self) -> int:
        """RoPE pairs of the position term, 0 without one."""
        return 0 if self.position is None else self.position.shape[-1]


@dataclass(frozen=True, eq=False)
class FramedQueries:
    """query (n, n_q_heads, d), coefficients (n, n_q_heads, 2, n_pairs) or None, offset
    (n, n_q_heads) or None: float32."""

    query: Tensor
    coefficients: Tensor | None
    offset: Tensor | None


def frame_tokens(
    frame: FrameTensors,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    tail: Tensor,
    rows: Tensor,
    turns: tuple[Tensor, Tensor] | None = None,
    with_offset: bool = True,
) -> FramedQueries:
    """One token of every sequence into the frame: its keys and values into the tail.

    query: (n, n_q_heads, d); key, value: (n, n_kv_heads, d); float32, bfloat16 or float16, strided
    as they are, but for their last dimension.  tail: bfloat16, contiguous, rows of d; rows:
    (2 n n_kv_heads) int64 in it, of all keys (sequence-major), then of all values; they are
    trusted.  turns: cosine and sine, (n, 1, d) float32 each, where the mean turns.  with_offset:
    whether the frame's offsets are asked for.  Waits for nothing.

    Raises:
        PageError: shapes, dtypes or devices that do not fit.
    """
    n, d, device = query.shape[0], frame.head_dim, frame.value.device
    vectors = {"query": (query, frame.n_q_heads)}
    vectors |= {"key": (key, frame.n_kv_heads), "value": (value, frame.n_kv_heads)}
    for name, (tensor, n_heads) in vectors.items():
        _require(name, tensor, (n, n_heads, d), query.dtype, device, whole=False)
    if query.dtype not in _TYPES:
        raise PageError(f"query is {query.dtype}; use float32, bfloat16 or float16")
    _require("rows", rows, (2 * n * frame.n_kv_heads,), torch.int64, device)
    _require("tail", tail, (*tail.shape[:-1], d), torch.bfloat16, device)
    if (turns is None) != (frame.mean is None):
        raise PageError("turns are for frames whose mean turns, and for them alone")
    for name, turn in zip(("cosine", "sine"), turns or (), strict=False):
        _require(name, turn, (n, 1, d), torch.float32, device)
    framed = torch.empty((n, frame.n_q_heads, d), dtype=torch.float32, device=device)
    coefficients = offsets = None
    if frame.n_pairs:
        coefficients = framed.new_empty((n, frame.n_q_heads, 2, frame.n_pairs))
    of_queries = frame.offset if with_offset else None
    if of_queries is not None:
        offsets = framed.new_empty((n, frame.n_q_heads))
    if not n:
        return FramedQueries(framed, coefficients, offsets)
    n_columns = d + 2 * frame.n_pairs + (of_queries is not None)
    p = _FrameParams()
    pointers = {
        "query": query, "key": key, "value": value, "query_matrix": frame.query,
        "key_matrix": frame.key, "value_matrix": frame.value, "centre": frame.centre,
        "mean": frame.mean, "turned": frame.turned, "cosine": turns and turns[0],
        "sine": turns and turns[1], "position": frame.position, "mean_logit": of_queries,
        "framed": framed, "coefficients": coefficients, "offsets": offsets, "tail": tail,
        "rows": rows,
    }  # fmt: skip
    for name, of_name in pointers.items():
        setattr(p, name, None if of_name is None else of_name.data_ptr())
    for index, (tensor, _) in enumerate(vectors.values()):
        p.sequence_stride[index], p.head_stride[index] = tensor.stride()[:2]
    p.query_matrix_stride = 0 if frame.query.shape[0] == 1 else d * d
    p.key_matrix_stride = 0 if frame.key.shape[0] == 1 else d * d
    p.n_sequences, p.n_q_heads, p.n_kv_heads = n, frame.n_q_heads, frame.n_kv_heads
    p.n_term_columns, p.n_chunks = 2 * frame.n_pairs, -(-n_columns // _N_COLUMNS)
    p.type = _TYPES[query.dtype]
    n_rows = _rows_at_once(n)
    function = _function("frame_tokens", d, n_rows, capability_of(device), device)
    grid = ((frame.n_q_heads + 2 * frame.n_kv_heads) * p.n_chunks, -(-n // n_rows))
    launch_function(function, grid, _N_THREADS, 0, device, p)
    return FramedQueries(framed, coefficients, offsets)


def unframe_outputs(frame: FrameTensors, outputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Outputs of attention (n, n_q_heads, d) float32, contiguous, out of the frame, in `dtype`.

    Raises:
        PageError: shapes, dtypes or devices that do not fit.
    """
    d, device = frame.head_dim, frame.value.device
    _require("outputs", outputs, (*outputs.shape[:-1], d), torch.float32, device)
    if dtype not in _TYPES:
        raise PageError(f"outputs in {dtype}; use float32, bfloat16 or float16")
    result = torch.empty(outputs.shape, dtype=dtype, device=device)
    count = outputs.numel() // d
    if not count:
        return result
    p = _UnframeParams()
    p.source, p.matrix, p.target = (x.data_ptr() for x in (outputs, frame.output, result))
    p.n_rows, p.type = count, _TYPES[dtype]
    # As many blocks as a small step has queries: what it waits for is latency.
    n_rows = _rows_at_once(count // 16)
    function = _function("unframe_outputs", d, n_rows, capability_of(device), device)
    launch_function(function, (d // _N_COLUMNS, -(-count // n_rows)), _N_THREADS, 0, device, p)
    return result


def frame_source(head_dim: int, n_rows: int) -> str:
    """CUDA text of both kernels; n_rows: vectors of a block."""
    constants = {"HEAD_DIM": head_dim, "ROWS": n_rows, "N_THREADS": _N_THREADS}
    preamble = "\n".join(f"#define {name} {value}" for name, value in constants.items())
    return "\n".join([preamble, *((_FOLDER / name).read_text() for name in _SOURCES)])


def _rows_at_once(n: int) -> int:
    n_rows = 1
    while n_rows < min(n, _MOST_ROWS):
        n_rows *= 2
    return n_rows


@lru_cache(maxsize=256)
def _function(name: str, head_dim: int, n_rows: int, capability: int, device: torch.device) -> Any:
    return load_function(frame_source(head_dim, n_rows), name, 0, capability, device)


def _require(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    whole: bool = True,
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        raise PageError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, expected {shape} "
            f"{dtype} on {device}"
        )
    if not (tensor.is_contiguous() if whole else tensor.stride(-1) == 1):
        raise PageError(f"{name} is not contiguous; call .contiguous()")


class _FrameParams(ctypes.Structure):
    """`FrameParams` of frame.cu."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "query", "key", "value", "query_matrix", "key_matrix", "value_matrix", "centre",
                "mean", "turned", "cosine", "sine", "position", "mean_logit", "framed",
                "coefficients", "offsets", "tail", "rows",
            )
        ),
        ("sequence_stride", ctypes.c_longlong * 3),
        ("head_stride", ctypes.c_longlong * 3),
        *(
            (name, ctypes.c_int)
            for name in (
                "query_matrix_stride", "key_matrix_stride", "n_sequences", "n_q_heads",
                "n_kv_heads", "n_term_columns", "n_chunks", "type",
            )
        ),
    )  # fmt: skip


class _UnframeParams(ctypes.Structure):
    """`UnframeParams` of frame.cu."""

    _fields_ = (
        ("source", ctypes.c_void_p),
        ("matrix", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("n_rows", ctypes.c_int),
        ("type", ctypes.c_int),
    )
