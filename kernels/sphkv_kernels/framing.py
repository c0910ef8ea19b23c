"""A decode step's vectors into the frame and its outputs out of it, one launch each.

    q' = q M_h   k' = (k - c_h - R_t mu_h) K_h   v' = v S   o = o' S^T

with the coefficients of a position term and the offset of a soft-capped logit where a frame has
them (`frame_tensors`); new keys and values go straight to their rows of a dense tail.  Torch
operations take eight launches for it, most of what a small step takes beside the model's own.  Sums
are float32; the reference is `framing_reference`.  `cuda/frame.cu`; source: ours.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphkv_kernels.frame_tensors import FramedQueries, FrameTensors, check_tokens
from sphkv_kernels.kernel_structs import agreement
from sphkv_kernels.launch import capability_of, launch_function, load_function
from sphkv_kernels.launch_arguments import FLOAT_TYPES, require
from sphkv_kernels.position_term import PositionTerm
from sphkv_kernels.tier import PageError
from sphkv_kernels.variant import SUPPORTED_HEAD_DIMS

_SOURCES = ("intrinsics.cuh", "frame.cu")
_FOLDER = Path(__file__).parent / "cuda"
_N_THREADS, _N_COLUMNS, _MOST_ROWS = 256, 64, 8
_MOST_BLOCKS = 65_535  # along the second dimension of a grid


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
        KernelBuildError, KernelLaunchError: as `prepare_framing`, at the first call.
    """
    _require_servable(frame)
    check_tokens(frame, query, key, value, tail, rows, turns)
    if query.dtype not in FLOAT_TYPES:
        raise PageError(f"query is {query.dtype}; use float32, bfloat16 or float16")
    n, d, device = query.shape[0], frame.head_dim, frame.device
    framed = torch.empty((n, frame.n_q_heads, d), dtype=torch.float32, device=device)
    coefficients = offsets = term = None
    if frame.frequencies is not None:
        coefficients = framed.new_empty((n, frame.n_q_heads, 2, frame.n_pairs))
        term = PositionTerm(coefficients, frame.frequencies)
    of_queries = frame.offset if with_offset else None
    if of_queries is not None:
        offsets = framed.new_empty((n, frame.n_q_heads))
    if not n:
        return FramedQueries(framed, term, offsets)
    n_columns = d + 2 * frame.n_pairs + (of_queries is not None)
    p = _FrameParams()
    pointers = {
        "query": query, "key": key, "value": value, "query_matrix": frame.query,
        "key_matrix": frame.key, "value_matrix": frame.value, "centre": frame.centre,
        "mean": frame.mean, "turned": frame.turned, "cosine": turns and turns[0],
        "sine": turns and turns[1], "position": frame.position, "offset": of_queries,
        "framed": framed, "coefficients": coefficients, "offsets": offsets, "tail": tail,
        "rows": rows,
    }  # fmt: skip
    for name, of_name in pointers.items():
        setattr(p, name, None if of_name is None else of_name.data_ptr())
    for index, tensor in enumerate((query, key, value)):
        p.sequence_stride[index], p.head_stride[index] = tensor.stride()[:2]
    p.query_matrix_stride = 0 if frame.query.shape[0] == 1 else d * d
    p.key_matrix_stride = 0 if frame.key.shape[0] == 1 else d * d
    p.n_sequences, p.n_q_heads, p.n_kv_heads = n, frame.n_q_heads, frame.n_kv_heads
    p.n_term_columns, p.n_chunks = 2 * frame.n_pairs, -(-n_columns // _N_COLUMNS)
    p.type = FLOAT_TYPES[query.dtype]
    n_rows = _rows_at_once(n)
    _require_grid("sequences", n, n_rows)
    function = _function("frame_tokens", d, n_rows, device)
    grid = ((frame.n_q_heads + 2 * frame.n_kv_heads) * p.n_chunks, -(-n // n_rows))
    launch_function(function, grid, _N_THREADS, 0, device, p)
    return FramedQueries(framed, term, offsets)


def unframe_outputs(frame: FrameTensors, outputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Outputs of attention (n, n_q_heads, d) float32, contiguous, out of the frame, in `dtype`.

    Raises:
        PageError: shapes, dtypes or devices that do not fit.
        KernelBuildError, KernelLaunchError: as `prepare_framing`, at the first call.
    """
    _require_servable(frame)
    d, device = frame.head_dim, frame.device
    require("outputs", outputs, (*outputs.shape[:-1], d), torch.float32, device)
    if dtype not in FLOAT_TYPES:
        raise PageError(f"outputs in {dtype}; use float32, bfloat16 or float16")
    result = torch.empty(outputs.shape, dtype=dtype, device=device)
    count = outputs.numel() // d
    if not count:
        return result
    p = _UnframeParams()
    p.source, p.matrix, p.target = (x.data_ptr() for x in (outputs, frame.output, result))
    p.n_rows, p.type = count, FLOAT_TYPES[dtype]
    n_rows = _rows_of_outputs(count)
    _require_grid("outputs", count, n_rows)
    function = _function("unframe_outputs", d, n_rows, device)
    launch_function(function, (d // _N_COLUMNS, -(-count // n_rows)), _N_THREADS, 0, device, p)
    return result


def prepare_framing(frame: FrameTensors, n_sequences: int) -> None:
    """Load the kernels of steps of so many sequences: a step that a CUDA graph captures cannot.

    Raises:
        PageError: head_dim, dtype or device that the kernels do not have.
        KernelBuildError: NVRTC is missing or refuses them.
        KernelLaunchError: the driver refuses them.
    """
    _require_servable(frame)
    d, device = frame.head_dim, frame.device
    _function("frame_tokens", d, _rows_at_once(n_sequences), device)
    n_rows = _rows_of_outputs(n_sequences * frame.n_q_heads)
    _function("unframe_outputs", d, n_rows, device)


def frame_source(head_dim: int, n_rows: int) -> str:
    """CUDA text of both kernels; n_rows: vectors of a block."""
    constants = {"HEAD_DIM": head_dim, "ROWS": n_rows, "N_THREADS": _N_THREADS}
    preamble = "\n".join(f"#define {name} {value}" for name, value in constants.items())
    structs = {"FrameParams": _FrameParams, "UnframeParams": _UnframeParams}
    agreements = [agreement(name, struct) for name, struct in structs.items()]
    texts = ((_FOLDER / name).read_text() for name in _SOURCES)
    return "\n".join([preamble, *texts, *agreements])


def _rows_at_once(n: int) -> int:
    """A power of two: few kernels."""
    return 1 << (max(min(n, _MOST_ROWS), 1) - 1).bit_length()


def _rows_of_outputs(n: int) -> int:
    """Few enough that a small step has many blocks: what it waits for is latency."""
    return _rows_at_once(n // 16)


def _require_grid(name: str, count: int, n_rows: int) -> None:
    if count > n_rows * _MOST_BLOCKS:
        raise PageError(f"{count} {name}: a launch takes up to {n_rows * _MOST_BLOCKS}; split them")


def _require_servable(frame: FrameTensors) -> None:
    d = frame.head_dim
    if d not in SUPPORTED_HEAD_DIMS or frame.device.type != "cuda" or frame.dtype != torch.float32:
        raise PageError(
            f"a frame of head_dim {d} in {frame.dtype} on {frame.device}: the CUDA kernel has "
            f"{SUPPORTED_HEAD_DIMS} in float32"
        )


@lru_cache(maxsize=256)
def _function(name: str, head_dim: int, n_rows: int, device: torch.device) -> Any:
    source = frame_source(head_dim, n_rows)
    return load_function(source, name, 0, capability_of(device), device)


class _FrameParams(ctypes.Structure):
    """`FrameParams` of frame.cu."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "query", "key", "value", "query_matrix", "key_matrix", "value_matrix", "centre",
                "mean", "turned", "cosine", "sine", "position", "offset", "framed",
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
